/* Devices, streams and events. Work is done when it is queued, so that a stream is only an identity. */
#include "cann.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static __thread int current = -1;
static uint64_t contexts[64];
static int32_t next_stream = 1;

static long number(const char* name, long otherwise) {
  const char* value = getenv(name);
  return value && *value ? strtol(value, NULL, 10) : otherwise;
}

/* NPUs that this process sees. */
static int devices(void) {
  long present = number("GRPO_CANN_DEVICES", 1);
  if (present > 64) present = 64;
  const char* visible = getenv("ASCEND_RT_VISIBLE_DEVICES");
  if (!visible) return present < 0 ? 0 : (int)present;
  int count = 0;
  for (char* end; *visible; visible = *end ? end + 1 : end) {
    long index = strtol(visible, &end, 10);
    if (end == visible || index < 0 || index >= present) break;
    count++;
  }
  return count;
}

int aclInit(const char* config) { return kOk; }
int aclFinalize(void) { return kOk; }

int aclrtGetDeviceCount(uint32_t* count) {
  *count = (uint32_t)devices();
  return kOk;
}

int aclrtSetDevice(int32_t device) {
  if (device < 0 || device >= devices()) return cann_refuse(kInvalid, "there is no device %d", device);
  current = device;
  return kOk;
}

int aclrtGetDevice(int32_t* device) {
  if (current < 0) return kNoContext;
  *device = current;
  return kOk;
}

int aclrtResetDevice(int32_t device) { return kOk; }

int aclrtGetCurrentContext(void** context) {
  if (current < 0) return kNoContext;
  *context = &contexts[current];
  return kOk;
}

int aclrtSetCurrentContext(void* context) {
  current = (int)((uint64_t*)context - contexts);
  return kOk;
}

int aclrtGetPrimaryCtxState(int32_t device, uint32_t* flags, int32_t* active) {
  if (flags) *flags = 0;
  *active = 1;
  return kOk;
}

const char* aclrtGetSocName(void) {
  const char* name = getenv("GRPO_CANN_SOC");
  return name && *name ? name : "Ascend910B3";
}

int aclrtDeviceCanAccessPeer(int32_t* can, int32_t device, int32_t peer) {
  *can = 1;
  return kOk;
}

/* Cores of one kind; the only figure of a device that is asked for. */
int aclGetDeviceCapability(uint32_t device, int kind, int64_t* value) {
  *value = 24;
  return kOk;
}
int aclrtGetDeviceInfo(uint32_t device, int kind, int64_t* value) {
  *value = 24;
  return kOk;
}
int aclrtGetDeviceResLimit(int32_t device, int kind, uint32_t* value) {
  *value = 24;
  return kOk;
}

int aclGetCannAttributeList(const int** list, size_t* count) {
  *list = NULL;
  *count = 0;
  return kOk;
}
int aclGetCannAttribute(int attribute, int32_t* value) {
  *value = 0;
  return kOk;
}

int aclsysGetVersionStr(char* package, char* version) {
  strcpy(version, "9.1.0");
  return kOk;
}
int aclsysGetCANNVersion(int package, char* version) {
  memset(version, 0, 64);
  strcpy(version, "9.1.0");
  return kOk;
}

size_t aclGetCompileoptSize(int option) { return 16; }
int aclGetCompileopt(int option, char* value, size_t length) {
  memset(value, 0, length);
  strncpy(value, "disable", length - 1);
  return kOk;
}

/* ---- streams */

int aclrtCreateStream(void** stream) {
  int32_t* made = calloc(1, 64);
  *made = __sync_fetch_and_add(&next_stream, 1);
  *stream = made;
  return kOk;
}
int aclrtCreateStreamWithConfig(void** stream, uint32_t priority, uint32_t flags) {
  return aclrtCreateStream(stream);
}
int aclrtDestroyStream(void* stream) { return kOk; }
int aclrtStreamGetId(void* stream, int32_t* id) {
  *id = stream ? *(int32_t*)stream : 0;
  return kOk;
}
int aclrtStreamQuery(void* stream, int* status) {
  *status = 0; /* complete */
  return kOk;
}

/* ---- events */

int aclrtCreateEvent(void** event) {
  *event = calloc(1, sizeof(struct timespec));
  return kOk;
}
int aclrtCreateEventWithFlag(void** event, uint32_t flag) { return aclrtCreateEvent(event); }
int aclrtCreateEventExWithFlag(void** event, uint32_t flag) { return aclrtCreateEvent(event); }
int aclrtDestroyEvent(void* event) {
  free(event);
  return kOk;
}
int aclrtRecordEvent(void* event, void* stream) { return clock_gettime(CLOCK_MONOTONIC, event) ? kInternal : kOk; }
int aclrtQueryEventStatus(void* event, int* status) {
  *status = 1; /* complete */
  return kOk;
}
int aclQueryEventRecordedStatus(void* event, int* status) { return aclrtQueryEventStatus(event, status); }
int aclrtQueryEventWaitStatus(void* event, int* status) { return aclrtQueryEventStatus(event, status); }
int aclrtEventElapsedTime(float* milliseconds, void* from, void* to) {
  const struct timespec *a = from, *b = to;
  *milliseconds = (float)((double)(b->tv_sec - a->tv_sec) * 1e3 + (double)(b->tv_nsec - a->tv_nsec) * 1e-6);
  return kOk;
}
int aclrtEventGetTimestamp(void* event, uint64_t* microseconds) {
  const struct timespec* at = event;
  *microseconds = (uint64_t)at->tv_sec * 1000000 + (uint64_t)at->tv_nsec / 1000;
  return kOk;
}

/* ---- graphs: nothing is ever being captured */

int aclmdlRICaptureGetInfo(void* stream, int* status, void** model) {
  *status = 0;
  *model = NULL;
  return kOk;
}
int aclmdlRICaptureThreadExchangeMode(int* mode) { return kOk; }
