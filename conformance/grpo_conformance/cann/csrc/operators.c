/* The few operators that torch_npu calls from its C++ below torch's dispatcher, on strided tensors.
 *
 * All others are computed above, in numeric.cpp; what gets here nevertheless is refused (see build.py). */
#include "cann.h"

#include <stdlib.h>
#include <string.h>

#define MOST 16

typedef struct {
  int rank, dtype;
  int64_t size[MOST], stride[MOST];
  char* at;
} tensor_t;
typedef struct {
  uint64_t count;
  int64_t* values;
} ints_t;
typedef struct {
  uint64_t count;
  const tensor_t** tensors;
} list_t;
typedef struct {
  int dtype;
  char value[16];
} scalar_t;

/* What GetWorkspaceSize prepares and the operator's own call carries out. */
typedef struct {
  tensor_t out, in;
  tensor_t* parts;
  uint64_t count;
  int64_t axis;
  double real;
  int64_t* pads;
} work_t;

void* aclCreateTensor(const int64_t* sizes, uint64_t rank, int dtype, const int64_t* strides, int64_t offset,
                      int format, const int64_t* storage, uint64_t storage_rank, void* data) {
  tensor_t* made = calloc(1, sizeof *made);
  made->rank = (int)(rank < MOST ? rank : MOST);
  made->dtype = dtype;
  for (int i = 0; i < made->rank; i++) {
    made->size[i] = sizes[i];
    made->stride[i] = strides ? strides[i] : 0;
  }
  made->at = (char*)data + (data ? offset * (int64_t)cann_size_of(dtype) : 0);
  return made;
}
int aclDestroyTensor(void* tensor) {
  free(tensor);
  return kOk;
}

void* aclCreateIntArray(const int64_t* values, uint64_t count) {
  ints_t* made = malloc(sizeof *made);
  made->count = count;
  made->values = malloc(count * sizeof *values + 1);
  memcpy(made->values, values, count * sizeof *values);
  return made;
}
int aclDestroyIntArray(void* array) {
  free(((ints_t*)array)->values);
  free(array);
  return kOk;
}

void* aclCreateTensorList(const void* const* tensors, uint64_t count) {
  list_t* made = malloc(sizeof *made);
  made->count = count;
  made->tensors = malloc(count * sizeof *tensors + 1);
  memcpy(made->tensors, tensors, count * sizeof *tensors);
  return made;
}
int aclDestroyTensorList(void* list) {
  list_t* given = list;
  for (uint64_t i = 0; i < given->count; i++) free((void*)given->tensors[i]);
  free(given->tensors);
  free(given);
  return kOk;
}

void* aclCreateScalar(const void* value, int dtype) {
  scalar_t* made = calloc(1, sizeof *made);
  made->dtype = dtype;
  memcpy(made->value, value, cann_size_of(dtype));
  return made;
}
int aclDestroyScalar(void* scalar) {
  free(scalar);
  return kOk;
}
static double real_of(const void* scalar) {
  const scalar_t* given = scalar;
  return cann_load_real(given->value, given->dtype);
}

/* ---- loops: out gets f(in), `in` broadcast to the sizes of `out` */

typedef void (*each_t)(char* out, int out_dtype, const char* in, int in_dtype, double real);

static void each_convert(char* out, int out_dtype, const char* in, int in_dtype, double real) {
  cann_convert(out, out_dtype, in, in_dtype);
}
static void each_divide(char* out, int out_dtype, const char* in, int in_dtype, double real) {
  cann_store_real(out, out_dtype, cann_load_real(in, in_dtype) / real);
}
static void each_fill(char* out, int out_dtype, const char* in, int in_dtype, double real) {
  cann_store_real(out, out_dtype, real);
}

static void walk(const tensor_t* out, const tensor_t* in, int axis, char* to, const char* from, each_t each,
                 double real) {
  size_t out_bytes = cann_size_of(out->dtype), in_bytes = cann_size_of(in->dtype);
  if (axis == out->rank) {
    each(to, out->dtype, from, in->dtype, real);
    return;
  }
  int other = axis - (out->rank - in->rank);
  int64_t step = other < 0 || in->size[other] == 1 ? 0 : in->stride[other] * (int64_t)in_bytes;
  int64_t stride = out->stride[axis] * (int64_t)out_bytes;
  int last = axis == out->rank - 1;
  if (last && each == each_convert && out->dtype == in->dtype && step == stride && stride == (int64_t)out_bytes) {
    memmove(to, from, (size_t)out->size[axis] * out_bytes);
    return;
  }
  for (int64_t i = 0; i < out->size[axis]; i++, to += stride, from += step)
    if (last)
      each(to, out->dtype, from, in->dtype, real);
    else
      walk(out, in, axis + 1, to, from, each, real);
}
static void apply(const tensor_t* out, const tensor_t* in, each_t each, double real) {
  for (int i = 0; i < out->rank; i++)
    if (out->size[i] == 0) return;
  walk(out, in, 0, out->at, in->at, each, real);
}

static int unknown(const tensor_t* tensor) {
  return cann_size_of(tensor->dtype) ? kOk : cann_refuse(kNoKernel, "data type %d is not computed", tensor->dtype);
}
static int prepare(const void* out, const void* in, uint64_t* bytes, void** executor) {
  work_t* work = calloc(1, sizeof *work);
  work->out = *(const tensor_t*)out;
  work->in = *(const tensor_t*)in;
  *bytes = 0;
  *executor = work;
  int status = unknown(&work->out);
  return status ? status : unknown(&work->in);
}
static int finish(const char* name, work_t* work, each_t each) {
  cann_record(name);
  apply(&work->out, &work->in, each, work->real);
  free(work);
  return kOk;
}

/* ---- the operators */

int aclnnInplaceCopyGetWorkspaceSize(void* self, void* src, uint64_t* bytes, void** executor) {
  return prepare(self, src, bytes, executor);
}
int aclnnInplaceCopy(void* workspace, uint64_t bytes, void* executor, void* stream) {
  return finish("aclnnInplaceCopy", executor, each_convert);
}

int aclnnCastGetWorkspaceSize(void* self, int dtype, void* out, uint64_t* bytes, void** executor) {
  return prepare(out, self, bytes, executor);
}
int aclnnCast(void* workspace, uint64_t bytes, void* executor, void* stream) {
  return finish("aclnnCast", executor, each_convert);
}

int aclnnInplaceZeroGetWorkspaceSize(void* self, uint64_t* bytes, void** executor) {
  return prepare(self, self, bytes, executor);
}
int aclnnInplaceZero(void* workspace, uint64_t bytes, void* executor, void* stream) {
  return finish("aclnnInplaceZero", executor, each_fill);
}

int aclnnDivsGetWorkspaceSize(void* self, void* other, void* out, uint64_t* bytes, void** executor) {
  int status = prepare(out, self, bytes, executor);
  ((work_t*)*executor)->real = real_of(other);
  return status;
}
int aclnnDivs(void* workspace, uint64_t bytes, void* executor, void* stream) {
  return finish("aclnnDivs", executor, each_divide);
}
int aclnnInplaceDivsGetWorkspaceSize(void* self, void* other, uint64_t* bytes, void** executor) {
  return aclnnDivsGetWorkspaceSize(self, other, self, bytes, executor);
}
int aclnnInplaceDivs(void* workspace, uint64_t bytes, void* executor, void* stream) {
  return finish("aclnnInplaceDivs", executor, each_divide);
}

int aclnnCatGetWorkspaceSize(void* list, int64_t axis, void* out, uint64_t* bytes, void** executor) {
  const list_t* given = list;
  int status = prepare(out, out, bytes, executor);
  work_t* work = *executor;
  work->count = given->count;
  work->parts = malloc(given->count * sizeof(tensor_t) + 1);
  for (uint64_t i = 0; i < given->count; i++) work->parts[i] = *given->tensors[i];
  work->axis = axis < 0 ? axis + work->out.rank : axis;
  return status;
}
int aclnnCat(void* workspace, uint64_t bytes, void* executor, void* stream) {
  cann_record("aclnnCat");
  work_t* work = executor;
  tensor_t place = work->out;
  for (uint64_t i = 0; i < work->count; i++) {
    const tensor_t* part = &work->parts[i];
    if (part->rank != place.rank) continue; /* an empty tensor of one dimension may stand anywhere */
    place.size[work->axis] = part->size[work->axis];
    apply(&place, part, each_convert, 0);
    place.at += part->size[work->axis] * place.stride[work->axis] * (int64_t)cann_size_of(place.dtype);
  }
  free(work->parts);
  free(work);
  return kOk;
}

int aclnnConstantPadNdGetWorkspaceSize(void* self, void* pads, void* value, void* out, uint64_t* bytes,
                                       void** executor) {
  const ints_t* given = pads;
  int status = prepare(out, self, bytes, executor);
  work_t* work = *executor;
  work->real = real_of(value);
  work->count = given->count;
  work->pads = malloc(given->count * sizeof(int64_t) + 1);
  memcpy(work->pads, given->values, given->count * sizeof(int64_t));
  return status;
}
int aclnnConstantPadNd(void* workspace, uint64_t bytes, void* executor, void* stream) {
  cann_record("aclnnConstantPadNd");
  work_t* work = executor;
  apply(&work->out, &work->out, each_fill, work->real);
  tensor_t place = work->out;
  int fits = 1;
  for (int i = 0; i < place.rank; i++) {
    uint64_t pair = 2 * (uint64_t)(place.rank - 1 - i);
    int64_t before = pair + 1 < work->count ? work->pads[pair] : 0;
    fits = fits && before >= 0 && before + work->in.size[i] <= place.size[i];
    place.at += before * place.stride[i] * (int64_t)cann_size_of(place.dtype);
    place.size[i] = work->in.size[i];
  }
  if (fits) apply(&place, &work->in, each_convert, 0);
  free(work->pads);
  free(work);
  return fits ? kOk : cann_refuse(kNoKernel, "padding that cuts is not computed");
}
