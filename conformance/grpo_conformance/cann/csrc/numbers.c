/* Numbers of the types that aclnn and HCCL know. */
#include "cann.h"

#include <string.h>

size_t cann_size_of(int dtype) {
  switch (dtype) {
    case kInt8: case kUInt8: case kBool: return 1;
    case kHalf: case kBFloat16: case kInt16: case kUInt16: return 2;
    case kFloat: case kInt32: case kUInt32: return 4;
    case kInt64: case kUInt64: case kDouble: case kComplex64: return 8;
    case kComplex128: return 16;
    default: return 0;
  }
}

int cann_is_integer(int dtype) {
  return dtype != kFloat && dtype != kHalf && dtype != kBFloat16 && dtype != kDouble;
}

static float from_bfloat16(uint16_t bits) {
  uint32_t wide = (uint32_t)bits << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}

/* To the nearest, ties to even. Through float first, as the hardware has no wider type. */
static uint16_t to_bfloat16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if (value != value) return 0x7fc0;
  return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

int64_t cann_load_integer(const void* at, int dtype) {
  switch (dtype) {
    case kInt8: return *(const int8_t*)at;
    case kUInt8: case kBool: return *(const uint8_t*)at;
    case kInt16: return *(const int16_t*)at;
    case kUInt16: return *(const uint16_t*)at;
    case kInt32: return *(const int32_t*)at;
    case kUInt32: return *(const uint32_t*)at;
    default: return *(const int64_t*)at;
  }
}

double cann_load_real(const void* at, int dtype) {
  switch (dtype) {
    case kFloat: return *(const float*)at;
    case kDouble: return *(const double*)at;
    case kHalf: return (double)*(const _Float16*)at;
    case kBFloat16: return from_bfloat16(*(const uint16_t*)at);
    case kUInt64: return (double)*(const uint64_t*)at;
    default: return (double)cann_load_integer(at, dtype);
  }
}

void cann_store_integer(void* at, int dtype, int64_t value) {
  switch (dtype) {
    case kInt8: case kUInt8: *(uint8_t*)at = (uint8_t)value; break;
    case kBool: *(uint8_t*)at = value != 0; break;
    case kInt16: case kUInt16: *(uint16_t*)at = (uint16_t)value; break;
    case kInt32: case kUInt32: *(uint32_t*)at = (uint32_t)value; break;
    case kInt64: case kUInt64: *(uint64_t*)at = (uint64_t)value; break;
    default: cann_store_real(at, dtype, (double)value);
  }
}

void cann_store_real(void* at, int dtype, double value) {
  switch (dtype) {
    case kFloat: *(float*)at = (float)value; break;
    case kDouble: *(double*)at = value; break;
    case kHalf: *(_Float16*)at = (_Float16)(float)value; break;
    case kBFloat16: *(uint16_t*)at = to_bfloat16((float)value); break;
    case kBool: *(uint8_t*)at = value != 0; break;
    default: cann_store_integer(at, dtype, (int64_t)value);
  }
}

void cann_convert(void* to, int to_dtype, const void* from, int from_dtype) {
  if (to_dtype == from_dtype)
    memcpy(to, from, cann_size_of(to_dtype));
  else if (cann_is_integer(from_dtype))
    cann_store_integer(to, to_dtype, cann_load_integer(from, from_dtype));
  else
    cann_store_real(to, to_dtype, cann_load_real(from, from_dtype));
}
