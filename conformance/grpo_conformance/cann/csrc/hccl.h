/* Communicators: a segment of shared memory that every rank maps. */
#ifndef GRPO_CANN_HCCL_H
#define GRPO_CANN_HCCL_H

#include "cann.h"

enum { kMostRanks = 64, kChunk = 1 << 20 };
enum { /* HCCL's results */
  kParameter = 1, kMemory = 3, kNotSupported = 5, kSystemCall = 8, kTimeout = 9, kRemote = 21,
};
enum { kSum = 0, kProduct = 1, kMaximum = 2, kMinimum = 3 };

/* What a rank says of the call that it is in, so that ranks in different calls find out. */
typedef struct {
  uint64_t kind, count, dtype, detail;
} said_t;

typedef struct {
  uint32_t joined, arrived, generation, broken;
  said_t said[kMostRanks];
  uint64_t pieces[kMostRanks][kMostRanks]; /* bytes from rank to rank in an all-to-all */
  uint32_t sent[kMostRanks][kMostRanks], received[kMostRanks][kMostRanks];
} header_t;

typedef struct {
  char name[128], path[256];
  uint32_t size, rank;
  double timeout;
  int file;
  uint64_t bytes;
  header_t* header;
  char* data;
} comm_t;

int comm_open(const char* name, uint32_t size, uint32_t rank, double timeout, comm_t** made);
int comm_close(comm_t* comm);
/* Wait for everybody. A peer that is gone or does not come within the timeout is an error for all. */
int comm_meet(comm_t* comm);
/* Meet, and see that everybody is in the same call. */
int comm_begin(comm_t* comm, said_t mine);
int comm_send(comm_t* comm, const void* from, uint64_t bytes, uint32_t to);
int comm_receive(comm_t* comm, void* to, uint64_t bytes, uint32_t from);
static inline char* comm_slot(const comm_t* comm, uint32_t rank) { return comm->data + (uint64_t)rank * kChunk; }

#endif
