/* HCCL: collectives between processes, a chunk of every rank at a time. */
#include "hccl.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { kAllReduce = 1, kReduce, kBroadcast, kReduceScatter, kAllGather, kScatter, kAllToAll, kBarrier };

static const int kinds[] = {kInt8,  kInt16,  kInt32,  kHalf,   kFloat,  kInt64,
                            kUInt64, kUInt8, kUInt16, kUInt32, kDouble, kBFloat16};
static int dtype_of(int hccl) { return hccl >= 0 && hccl < 12 ? kinds[hccl] : -1; }
static uint64_t bytes_of(int hccl) { return dtype_of(hccl) < 0 ? 0 : cann_size_of(dtype_of(hccl)); }
static uint64_t least(uint64_t a, uint64_t b) { return a < b ? a : b; }

/* ---- communicators */

static double execution_timeout(void) {
  const char* given = getenv("HCCL_EXEC_TIMEOUT");
  double seconds = given ? strtod(given, NULL) : 0;
  return seconds > 0 ? seconds : 1836;
}

int HcclGetRootInfo(char* root) {
  static uint32_t made;
  memset(root, 0, 4108);
  snprintf(root, 64, "%d-%u", (int)getpid(), __sync_add_and_fetch(&made, 1));
  return kOk;
}

int HcclCommInitRootInfo(uint32_t size, const char* root, uint32_t rank, void** comm) {
  cann_record("HcclCommInitRootInfo");
  return comm_open(root, size, rank, execution_timeout(), (comm_t**)comm);
}

/* The part of HcclCommConfig that is heeded: its size in front, the timeout of a call behind the names. */
enum { kTimeoutAt = 24 + 4 + 4 + 128 + 128 + 4 * 4 + 8 + 4 };
static double timeout_of(const char* config) {
  uint64_t size = 0;
  int32_t seconds = 0;
  if (config) memcpy(&size, config, sizeof size);
  if (size >= kTimeoutAt + sizeof seconds) memcpy(&seconds, config + kTimeoutAt, sizeof seconds);
  return seconds > 0 ? seconds : execution_timeout();
}

int HcclCommInitRootInfoConfig(uint32_t size, const char* root, uint32_t rank, const void* config, void** comm) {
  cann_record("HcclCommInitRootInfoConfig");
  return comm_open(root, size, rank, timeout_of(config), (comm_t**)comm);
}

int HcclCreateSubCommConfig(void** whole, uint32_t size, uint32_t* ranks, uint64_t id, uint32_t rank, void* config,
                            void** comm) {
  cann_record("HcclCreateSubCommConfig");
  char name[160];
  snprintf(name, sizeof name, "%s-%llu", ((comm_t*)*whole)->name, (unsigned long long)id);
  return comm_open(name, size, rank, timeout_of(config), (comm_t**)comm);
}

int HcclCommDestroy(void* comm) {
  cann_record("HcclCommDestroy");
  return comm_close(comm);
}
int HcclGetCommName(void* comm, char* name) {
  strcpy(name, ((comm_t*)comm)->name);
  return kOk;
}
int HcclGetRankSize(void* comm, uint32_t* size) {
  *size = ((comm_t*)comm)->size;
  return kOk;
}
int HcclGetRankId(void* comm, uint32_t* rank) {
  *rank = ((comm_t*)comm)->rank;
  return kOk;
}
/* Reductions are deterministic, whatever is asked for. */
int HcclSetConfig(int config, int32_t value) { return kOk; }
int HcclGetConfig(int config, int32_t* value) {
  *value = 1;
  return kOk;
}
/* Errors are told by the calls themselves, which wait for their peers. */
int HcclGetCommAsyncError(void* comm, int* error) {
  *error = kOk;
  return kOk;
}
uint32_t HcclGetCommConfigCapability(void) { return 12; }
const char* HcclGetErrorString(int result) {
  switch (result) {
    case kParameter: return "wrong parameter";
    case kMemory: return "memory";
    case kNotSupported: return "not supported";
    case kSystemCall: return "system call";
    case kTimeout: return "timeout";
    case kRemote: return "a peer is gone";
    default: return result ? "error" : "no error";
  }
}

/* ---- reductions: what an Atlas A2 takes; the sum is made in double, or in integers that wrap */

static int may_reduce(int hccl, int op) {
  int dtype = dtype_of(hccl);
  int known = dtype == kInt8 || dtype == kInt16 || dtype == kInt32 || dtype == kInt64 || dtype == kHalf ||
              dtype == kFloat || dtype == kBFloat16;
  int product = op == kProduct && (dtype == kInt16 || dtype == kBFloat16);
  if (known && !product && op >= kSum && op <= kMinimum) return kOk;
  return cann_refuse(kNotSupported, "HCCL does not reduce data type %d with operation %d", hccl, op);
}

static int64_t reduce_integers(int64_t a, int64_t b, int op) {
  switch (op) {
    case kSum: return (int64_t)((uint64_t)a + (uint64_t)b);
    case kProduct: return (int64_t)((uint64_t)a * (uint64_t)b);
    case kMaximum: return a > b ? a : b;
    default: return a < b ? a : b;
  }
}
static double reduce_reals(double a, double b, int op) {
  switch (op) {
    case kSum: return a + b;
    case kProduct: return a * b;
    case kMaximum: return a > b || a != a ? a : b;
    default: return a < b || a != a ? a : b;
  }
}

static void reduce(const comm_t* comm, char* out, uint64_t count, int dtype, int op) {
  uint64_t width = cann_size_of(dtype);
  int integer = cann_is_integer(dtype);
  for (uint64_t at = 0; at < count * width; at += width) {
    const char* first = comm_slot(comm, 0) + at;
    int64_t whole = integer ? cann_load_integer(first, dtype) : 0;
    double real = integer ? 0 : cann_load_real(first, dtype);
    for (uint32_t rank = 1; rank < comm->size; rank++) {
      const char* next = comm_slot(comm, rank) + at;
      if (integer)
        whole = reduce_integers(whole, cann_load_integer(next, dtype), op);
      else
        real = reduce_reals(real, cann_load_real(next, dtype), op);
    }
    if (integer)
      cann_store_integer(out + at, dtype, whole);
    else
      cann_store_real(out + at, dtype, real);
  }
}

/* `count` numbers that start `skip` numbers into `from` are reduced into `to`, which is NULL for who gets none. */
static int reduced(comm_t* comm, const char* from, uint64_t skip, char* to, uint64_t count, int hccl, int op) {
  uint64_t width = bytes_of(hccl), step = kChunk / width;
  int status = kOk;
  for (uint64_t done = 0; !status && done < count; done += step) {
    uint64_t part = least(step, count - done);
    memcpy(comm_slot(comm, comm->rank), from + (skip + done) * width, part * width);
    status = comm_meet(comm);
    if (!status && to) reduce(comm, to + done * width, part, dtype_of(hccl), op);
    if (!status) status = comm_meet(comm);
  }
  return status;
}

static said_t said(uint64_t kind, uint64_t count, int hccl, uint64_t detail) {
  return (said_t){kind, count, (uint64_t)hccl, detail};
}

int HcclAllReduce(void* from, void* to, uint64_t count, int hccl, int op, void* of, void* stream) {
  cann_record("HcclAllReduce");
  comm_t* comm = of;
  int status = may_reduce(hccl, op);
  if (!status) status = comm_begin(comm, said(kAllReduce, count, hccl, (uint64_t)op));
  if (!status) status = reduced(comm, from, 0, to, count, hccl, op);
  return status ? status : comm_meet(comm);
}

int HcclReduce(void* from, void* to, uint64_t count, int hccl, int op, uint32_t root, void* of, void* stream) {
  cann_record("HcclReduce");
  comm_t* comm = of;
  int status = may_reduce(hccl, op);
  if (!status) status = comm_begin(comm, said(kReduce, count, hccl, (uint64_t)op << 32 | root));
  if (!status) status = reduced(comm, from, 0, comm->rank == root ? to : NULL, count, hccl, op);
  return status ? status : comm_meet(comm);
}

int HcclReduceScatterV(void* from, const uint64_t* counts, const uint64_t* places, void* to, uint64_t count, int hccl,
                       int op, void* of, void* stream) {
  cann_record("HcclReduceScatterV");
  comm_t* comm = of;
  uint64_t total = 0;
  for (uint32_t rank = 0; rank < comm->size; rank++) total += counts[rank];
  int status = may_reduce(hccl, op);
  if (!status && counts[comm->rank] != count) status = cann_refuse(kParameter, "counts do not fit");
  if (!status) status = comm_begin(comm, said(kReduceScatter, total, hccl, (uint64_t)op));
  for (uint32_t rank = 0; !status && rank < comm->size; rank++)
    status = reduced(comm, from, places[rank], rank == comm->rank ? to : NULL, counts[rank], hccl, op);
  return status ? status : comm_meet(comm);
}

int HcclReduceScatter(void* from, void* to, uint64_t count, int hccl, int op, void* of, void* stream) {
  uint64_t counts[kMostRanks], places[kMostRanks];
  for (uint32_t rank = 0; rank < ((comm_t*)of)->size; rank++) {
    counts[rank] = count;
    places[rank] = count * rank;
  }
  return HcclReduceScatterV(from, counts, places, to, count, hccl, op, of, stream);
}

/* ---- moves */

static int movable(int hccl) {
  return bytes_of(hccl) ? kOk : cann_refuse(kNotSupported, "HCCL does not move data type %d", hccl);
}

int HcclBroadcast(void* data, uint64_t count, int hccl, uint32_t root, void* of, void* stream) {
  cann_record("HcclBroadcast");
  comm_t* comm = of;
  uint64_t bytes = count * bytes_of(hccl);
  int status = movable(hccl);
  if (!status) status = comm_begin(comm, said(kBroadcast, count, hccl, root));
  for (uint64_t done = 0; !status && done < bytes; done += kChunk) {
    uint64_t part = least(kChunk, bytes - done);
    if (comm->rank == root) memcpy(comm_slot(comm, root), (char*)data + done, part);
    status = comm_meet(comm);
    if (!status && comm->rank != root) memcpy((char*)data + done, comm_slot(comm, root), part);
    if (!status) status = comm_meet(comm);
  }
  return status ? status : comm_meet(comm);
}

int HcclAllGatherV(void* from, uint64_t count, void* to, const uint64_t* counts, const uint64_t* places, int hccl,
                   void* of, void* stream) {
  cann_record("HcclAllGatherV");
  comm_t* comm = of;
  uint64_t width = bytes_of(hccl), total = 0, most = 0;
  for (uint32_t rank = 0; rank < comm->size; rank++) {
    total += counts[rank];
    most = counts[rank] > most ? counts[rank] : most;
  }
  int status = movable(hccl);
  if (!status && counts[comm->rank] != count) status = cann_refuse(kParameter, "counts do not fit");
  if (!status) status = comm_begin(comm, said(kAllGather, total, hccl, most));
  for (uint64_t done = 0; !status && done < most * width; done += kChunk) {
    uint64_t mine = count * width;
    if (done < mine) memcpy(comm_slot(comm, comm->rank), (char*)from + done, least(kChunk, mine - done));
    status = comm_meet(comm);
    for (uint32_t rank = 0; !status && rank < comm->size; rank++) {
      uint64_t theirs = counts[rank] * width;
      if (done < theirs)
        memcpy((char*)to + places[rank] * width + done, comm_slot(comm, rank), least(kChunk, theirs - done));
    }
    if (!status) status = comm_meet(comm);
  }
  return status ? status : comm_meet(comm);
}

int HcclAllGather(void* from, void* to, uint64_t count, int hccl, void* of, void* stream) {
  uint64_t counts[kMostRanks], places[kMostRanks];
  for (uint32_t rank = 0; rank < ((comm_t*)of)->size; rank++) {
    counts[rank] = count;
    places[rank] = count * rank;
  }
  return HcclAllGatherV(from, count, to, counts, places, hccl, of, stream);
}

int HcclScatter(void* from, void* to, uint64_t count, int hccl, uint32_t root, void* of, void* stream) {
  cann_record("HcclScatter");
  comm_t* comm = of;
  uint64_t bytes = count * bytes_of(hccl);
  int status = movable(hccl);
  if (!status) status = comm_begin(comm, said(kScatter, count, hccl, root));
  for (uint32_t rank = 0; !status && rank < comm->size; rank++)
    for (uint64_t done = 0; !status && done < bytes; done += kChunk) {
      uint64_t part = least(kChunk, bytes - done);
      if (comm->rank == root) memcpy(comm_slot(comm, root), (char*)from + rank * bytes + done, part);
      status = comm_meet(comm);
      if (!status && comm->rank == rank) memcpy((char*)to + done, comm_slot(comm, root), part);
      if (!status) status = comm_meet(comm);
    }
  return status ? status : comm_meet(comm);
}

int HcclAlltoAllV(const void* from, const uint64_t* counts, const uint64_t* places, int hccl, const void* to,
                  const uint64_t* to_counts, const uint64_t* to_places, int to_hccl, void* of, void* stream) {
  cann_record("HcclAlltoAllV");
  comm_t* comm = of;
  uint64_t width = bytes_of(hccl), share = kChunk / comm->size, most = 0;
  uint32_t me = comm->rank, n = comm->size;
  int status = movable(hccl);
  if (!status && hccl != to_hccl) status = cann_refuse(kParameter, "two data types in one exchange");
  for (uint32_t rank = 0; !status && rank < n; rank++) comm->header->pieces[me][rank] = counts[rank] * width;
  if (!status) status = comm_begin(comm, said(kAllToAll, 0, hccl, 0));
  int fits = 1;
  for (uint32_t a = 0; !status && a < n; a++) {
    fits = fits && comm->header->pieces[a][me] == to_counts[a] * width;
    for (uint32_t b = 0; b < n; b++) most = comm->header->pieces[a][b] > most ? comm->header->pieces[a][b] : most;
  }
  for (uint64_t done = 0; !status && done < most; done += share) {
    for (uint32_t rank = 0; rank < n; rank++) {
      uint64_t bytes = counts[rank] * width;
      if (done < bytes)
        memcpy(comm_slot(comm, me) + rank * share, (const char*)from + places[rank] * width + done,
               least(share, bytes - done));
    }
    status = comm_meet(comm);
    for (uint32_t rank = 0; !status && fits && rank < n; rank++) {
      uint64_t bytes = to_counts[rank] * width;
      if (done < bytes)
        memcpy((char*)to + to_places[rank] * width + done, comm_slot(comm, rank) + me * share,
               least(share, bytes - done));
    }
    if (!status) status = comm_meet(comm);
  }
  if (!status) status = comm_meet(comm);
  return status || fits ? status : cann_refuse(kParameter, "what others send is not what rank %u expects", me);
}

int HcclAlltoAll(const void* from, uint64_t count, int hccl, const void* to, uint64_t to_count, int to_hccl, void* of,
                 void* stream) {
  uint64_t counts[kMostRanks], places[kMostRanks], to_counts[kMostRanks], to_places[kMostRanks];
  for (uint32_t rank = 0; rank < ((comm_t*)of)->size; rank++) {
    counts[rank] = count;
    places[rank] = count * rank;
    to_counts[rank] = to_count;
    to_places[rank] = to_count * rank;
  }
  return HcclAlltoAllV(from, counts, places, hccl, to, to_counts, to_places, to_hccl, of, stream);
}

int HcclBarrier(void* of, void* stream) {
  cann_record("HcclBarrier");
  int status = comm_begin(of, said(kBarrier, 0, 0, 0));
  return status ? status : comm_meet(of);
}

/* ---- from one rank to another; within a group of calls all are sent before any is received */

typedef struct {
  int receives;
  void* data;
  uint64_t count;
  int hccl;
  uint32_t peer;
} item_t;
typedef struct {
  item_t item;
  comm_t* comm;
} waiting_t;
static __thread waiting_t* waiting;
static __thread uint32_t held, depth;

static int move(const item_t* item, comm_t* comm) {
  int status = movable(item->hccl);
  uint64_t bytes = item->count * bytes_of(item->hccl);
  if (status) return status;
  return item->receives ? comm_receive(comm, item->data, bytes, item->peer)
                        : comm_send(comm, item->data, bytes, item->peer);
}

static int move_now_or_at_the_end(item_t item, void* comm) {
  if (!depth) return move(&item, comm);
  waiting = realloc(waiting, (held + 1) * sizeof *waiting);
  waiting[held++] = (waiting_t){item, comm};
  return kOk;
}

int HcclSend(void* from, uint64_t count, int hccl, uint32_t to, void* comm, void* stream) {
  cann_record("HcclSend");
  return move_now_or_at_the_end((item_t){0, from, count, hccl, to}, comm);
}
int HcclRecv(void* to, uint64_t count, int hccl, uint32_t from, void* comm, void* stream) {
  cann_record("HcclRecv");
  return move_now_or_at_the_end((item_t){1, to, count, hccl, from}, comm);
}

int HcclGroupStart(void) {
  depth++;
  return kOk;
}
int HcclGroupEnd(void) {
  if (!depth || --depth) return depth ? kOk : cann_refuse(kParameter, "a group ends that has not begun");
  int status = kOk;
  for (int receives = 0; receives < 2; receives++)
    for (uint32_t i = 0; !status && i < held; i++)
      if (waiting[i].item.receives == receives) status = move(&waiting[i].item, waiting[i].comm);
  held = 0;
  return status;
}

int HcclBatchSendRecv(item_t* items, uint32_t count, void* comm, void* stream) {
  cann_record("HcclBatchSendRecv");
  int status = kOk;
  for (int receives = 0; receives < 2; receives++)
    for (uint32_t i = 0; !status && i < count; i++)
      if (items[i].receives == receives) status = move(&items[i], comm);
  return status;
}
