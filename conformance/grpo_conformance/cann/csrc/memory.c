/* Memory of a device and of the host, both the host's. */
#define _GNU_SOURCE
#include "cann.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#define HEAD 512              /* before each block: its size; also what aclrtMalloc aligns to */
#define POISON_BELOW (64 << 20) /* larger blocks stay untouched, so that tests of running out cost nothing */

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static uint64_t taken;

static uint64_t capacity(void) {
  const char* value = getenv("GRPO_CANN_MEMORY");
  return value && *value ? strtoull(value, NULL, 10) : 4ull << 30;
}

static int take(uint64_t bytes) {
  pthread_mutex_lock(&mutex);
  int fits = bytes <= capacity() - taken;
  if (fits) taken += bytes;
  pthread_mutex_unlock(&mutex);
  return fits ? kOk : cann_refuse(kNoMemory, "%llu bytes do not fit", (unsigned long long)bytes);
}

static void give(uint64_t bytes) {
  pthread_mutex_lock(&mutex);
  taken -= bytes;
  pthread_mutex_unlock(&mutex);
}

int aclrtGetMemInfo(int kind, size_t* free, size_t* total) {
  *total = capacity();
  *free = *total - taken;
  return kOk;
}

int aclrtMalloc(void** pointer, size_t bytes, int policy) {
  cann_record("aclrtMalloc");
  *pointer = NULL;
  int status = take(bytes);
  if (status) return status;
  void* block = NULL;
  if (posix_memalign(&block, HEAD, bytes + 2 * HEAD)) {
    give(bytes);
    return cann_refuse(kNoMemory, "the host has no %zu bytes left", bytes);
  }
  *(uint64_t*)block = bytes;
  *pointer = (char*)block + HEAD;
  /* Whoever reads what nobody has written finds NaN. */
  if (bytes < POISON_BELOW) memset(*pointer, 0xff, bytes);
  return kOk;
}
int aclrtMallocAlign32(void** pointer, size_t bytes, int policy) { return aclrtMalloc(pointer, bytes, policy); }
int aclrtMallocWithCfg(void** pointer, size_t bytes, int policy, void* config) {
  return aclrtMalloc(pointer, bytes, policy);
}

int aclrtFree(void* pointer) {
  cann_record("aclrtFree");
  if (!pointer) return kOk;
  char* block = (char*)pointer - HEAD;
  give(*(uint64_t*)block);
  free(block);
  return kOk;
}

int aclrtMallocHost(void** pointer, size_t bytes) {
  return posix_memalign(pointer, 4096, bytes ? bytes : 1) ? kNoMemory : kOk;
}
int aclrtMallocHostWithCfg(void** pointer, uint64_t bytes, void* config) { return aclrtMallocHost(pointer, bytes); }
int aclrtFreeHost(void* pointer) {
  free(pointer);
  return kOk;
}

static int copy(void* to, size_t room, const void* from, size_t bytes) {
  if (bytes > room) return cann_refuse(kInvalid, "%zu bytes copied into %zu", bytes, room);
  memmove(to, from, bytes);
  return kOk;
}
int aclrtMemcpy(void* to, size_t room, const void* from, size_t bytes, int kind) {
  cann_record("aclrtMemcpy");
  return copy(to, room, from, bytes);
}
int aclrtMemcpyAsync(void* to, size_t room, const void* from, size_t bytes, int kind, void* stream) {
  cann_record("aclrtMemcpyAsync");
  return copy(to, room, from, bytes);
}
int aclrtMemcpyAsyncWithCondition(void* to, size_t room, const void* from, size_t bytes, int kind, void* stream) {
  return aclrtMemcpyAsync(to, room, from, bytes, kind, stream);
}
int aclrtMemset(void* to, size_t room, int32_t value, size_t bytes) {
  memset(to, value, bytes);
  return kOk;
}
int aclrtMemsetAsync(void* to, size_t room, int32_t value, size_t bytes, void* stream) {
  return aclrtMemset(to, room, value, bytes);
}

/* ---- virtual memory: addresses are reserved, physical blocks are files in memory that are mapped there */

typedef struct {
  int file;
  uint64_t bytes;
} block_t;
typedef struct piece {
  void* at;
  size_t bytes;
  struct piece* next;
} piece_t;
static piece_t *reserved, *mapped;

static void note(piece_t** list, void* at, size_t bytes) {
  piece_t* made = malloc(sizeof *made);
  pthread_mutex_lock(&mutex);
  *made = (piece_t){at, bytes, *list};
  *list = made;
  pthread_mutex_unlock(&mutex);
}

/* Takes the piece out; its bytes, 0 for one that is not there. */
static size_t forget(piece_t** list, void* at) {
  size_t bytes = 0;
  pthread_mutex_lock(&mutex);
  for (piece_t** link = list; *link; link = &(*link)->next)
    if ((*link)->at == at) {
      piece_t* found = *link;
      bytes = found->bytes;
      *link = found->next;
      free(found);
      break;
    }
  pthread_mutex_unlock(&mutex);
  return bytes;
}

int aclrtReserveMemAddress(void** pointer, size_t bytes, size_t alignment, void* wish, uint64_t flags) {
  cann_record("aclrtReserveMemAddress");
  void* at = mmap(wish, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) return cann_refuse(kNoMemory, "%zu bytes of addresses cannot be reserved", bytes);
  note(&reserved, at, bytes);
  *pointer = at;
  return kOk;
}

int aclrtReleaseMemAddress(void* pointer) {
  size_t bytes = forget(&reserved, pointer);
  if (!bytes) return cann_refuse(kInvalid, "addresses released that were not reserved");
  return munmap(pointer, bytes) ? kInternal : kOk;
}

int aclrtMallocPhysical(void** handle, size_t bytes, const void* properties, uint64_t flags) {
  cann_record("aclrtMallocPhysical");
  static int raised;
  struct rlimit limit;
  if (!raised++ && !getrlimit(RLIMIT_NOFILE, &limit)) {
    limit.rlim_cur = limit.rlim_max; /* each block is an open file */
    setrlimit(RLIMIT_NOFILE, &limit);
  }
  int status = take(bytes);
  if (status) return status;
  block_t* made = malloc(sizeof *made);
  *made = (block_t){memfd_create("grpo-cann", MFD_CLOEXEC), bytes};
  if (made->file < 0 || ftruncate(made->file, (off_t)bytes)) {
    if (made->file >= 0) close(made->file);
    free(made);
    give(bytes);
    return cann_refuse(kNoMemory, "the host has no %zu bytes left", bytes);
  }
  *handle = made;
  return kOk;
}

int aclrtFreePhysical(void* handle) {
  cann_record("aclrtFreePhysical");
  block_t* block = handle;
  give(block->bytes);
  close(block->file);
  free(block);
  return kOk;
}

int aclrtMapMem(void* pointer, size_t bytes, size_t offset, void* handle, uint64_t flags) {
  cann_record("aclrtMapMem");
  void* at = mmap(pointer, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, ((block_t*)handle)->file,
                  (off_t)offset);
  if (at == MAP_FAILED) return cann_refuse(kInternal, "memory cannot be mapped");
  note(&mapped, pointer, bytes);
  return kOk;
}

int aclrtUnmapMem(void* pointer) {
  cann_record("aclrtUnmapMem");
  size_t bytes = forget(&mapped, pointer);
  if (!bytes) return cann_refuse(kInvalid, "memory unmapped that was not mapped");
  void* at = mmap(pointer, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  return at == MAP_FAILED ? kInternal : kOk;
}
