/* A simulated CANN: what its parts know of each other.
 *
 * Device memory is host memory, and everything is finished when its call returns. Names, arguments and status
 * numbers of CANN's C interface are facts of its documentation; nothing of CANN's is copied. */
#ifndef GRPO_CANN_H
#define GRPO_CANN_H

#include <stddef.h>
#include <stdint.h>

enum {
  kOk = 0,
  kInvalid = 107000,      /* ACL_ERROR_RT_PARAM_INVALID */
  kNoContext = 107002,    /* ACL_ERROR_RT_CONTEXT_NULL */
  kUnsupported = 207000,  /* ACL_ERROR_RT_FEATURE_NOT_SUPPORT */
  kNoMemory = 207001,     /* ACL_ERROR_RT_MEMORY_ALLOCATION */
  kInternal = 507899,     /* ACL_ERROR_RT_DRV_INTERNAL_ERROR */
  kNoKernel = 561103,     /* ACLNN_ERR_INNER_NULLPTR: no kernel was found */
};

/* ---- what was called, and the text of the last error of this thread */
void cann_record(const char* name);
int cann_refuse(int status, const char* form, ...);

/* ---- numbers: the data types of aclnn; HCCL's are mapped to them */
enum {
  kFloat = 0, kHalf = 1, kInt8 = 2, kInt32 = 3, kUInt8 = 4, kInt16 = 6, kUInt16 = 7, kUInt32 = 8, kInt64 = 9,
  kUInt64 = 10, kDouble = 11, kBool = 12, kComplex64 = 16, kComplex128 = 17, kBFloat16 = 27,
};
size_t cann_size_of(int dtype); /* bytes, 0 for one that is not known */
int cann_is_integer(int dtype);
int64_t cann_load_integer(const void* at, int dtype);
double cann_load_real(const void* at, int dtype);
void cann_store_integer(void* at, int dtype, int64_t value);
void cann_store_real(void* at, int dtype, double value);
/* One number of another type. */
void cann_convert(void* to, int to_dtype, const void* from, int from_dtype);

#endif
