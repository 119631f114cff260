/* How ranks meet in shared memory, and how they notice that one of them is gone.
 *
 * Every rank holds a lock on its own byte of the segment's file for as long as it lives: the system lets go of it
 * when the process ends, however it does. */
#define _GNU_SOURCE
#include "hccl.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static double now(void) {
  struct timespec at;
  clock_gettime(CLOCK_MONOTONIC, &at);
  return (double)at.tv_sec + (double)at.tv_nsec * 1e-9;
}

static uint32_t read_of(const uint32_t* word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }

static void wake(uint32_t* word) { syscall(SYS_futex, word, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0); }

/* Sleep until the word changes, for two milliseconds at most. */
static void doze(uint32_t* word, uint32_t seen) {
  struct timespec most = {0, 2000000};
  syscall(SYS_futex, word, FUTEX_WAIT, seen, &most, NULL, 0);
}

static int lock_of(uint32_t rank, struct flock* lock) {
  *lock = (struct flock){.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = rank, .l_len = 1};
  return 0;
}

/* A rank that has joined and is gone, -1 for none. */
static int lost(const comm_t* comm) {
  for (uint32_t rank = 0; rank < comm->size; rank++) {
    struct flock lock;
    lock_of(rank, &lock);
    if (rank == comm->rank || fcntl(comm->file, F_OFD_GETLK, &lock)) continue;
    if (lock.l_type == F_UNLCK) return (int)rank;
  }
  return -1;
}

/* Wait until the word is no longer `seen`; `all` have joined already, so that one who is missing has died. */
static int await(comm_t* comm, uint32_t* word, uint32_t seen, double timeout, int all) {
  double until = now() + timeout;
  for (int round = 0; read_of(word) == seen; round++) {
    if (read_of(&comm->header->broken)) return cann_refuse(kRemote, "a rank of %s is gone", comm->name);
    doze(word, seen);
    if (round % 4 != 3 || read_of(word) != seen) continue;
    int gone = all ? lost(comm) : -1;
    if (gone < 0 && now() < until) continue;
    /* It may have come last and left in good order meanwhile. */
    if (read_of(word) != seen) break;
    __atomic_store_n(&comm->header->broken, 1, __ATOMIC_RELEASE);
    wake(word);
    if (gone >= 0) return cann_refuse(kRemote, "rank %d of %s is gone", gone, comm->name);
    return cann_refuse(kTimeout, "not all ranks of %s came within %.1f s", comm->name, timeout);
  }
  return kOk;
}

int comm_meet(comm_t* comm) {
  header_t* header = comm->header;
  if (read_of(&header->broken)) return cann_refuse(kRemote, "a rank of %s is gone", comm->name);
  uint32_t seen = read_of(&header->generation);
  if (__atomic_add_fetch(&header->arrived, 1, __ATOMIC_ACQ_REL) < comm->size)
    return await(comm, &header->generation, seen, comm->timeout, 1);
  __atomic_store_n(&header->arrived, 0, __ATOMIC_RELAXED);
  __atomic_store_n(&header->generation, seen + 1, __ATOMIC_RELEASE);
  wake(&header->generation);
  return kOk;
}

int comm_begin(comm_t* comm, said_t mine) {
  comm->header->said[comm->rank] = mine;
  int status = comm_meet(comm);
  for (uint32_t rank = 0; !status && rank < comm->size; rank++)
    if (memcmp(&comm->header->said[rank], &mine, sizeof mine))
      status = cann_refuse(kParameter, "ranks %u and %u of %s are in different calls", comm->rank, rank, comm->name);
  return status;
}

static const char* folder(void) {
  const char* given = getenv("GRPO_CANN_FOLDER");
  return given && *given ? given : "/dev/shm";
}

static double connect_timeout(void) {
  const char* given = getenv("HCCL_CONNECT_TIMEOUT");
  double seconds = given ? strtod(given, NULL) : 0;
  return seconds > 0 ? seconds : 120;
}

int comm_open(const char* name, uint32_t size, uint32_t rank, double timeout, comm_t** made) {
  if (size < 1 || size > kMostRanks || rank >= size) return cann_refuse(kParameter, "%u ranks", size);
  comm_t* comm = calloc(1, sizeof *comm);
  snprintf(comm->name, sizeof comm->name, "%s", name);
  snprintf(comm->path, sizeof comm->path, "%s/grpo-cann-%s", folder(), name);
  comm->size = size;
  comm->rank = rank;
  comm->timeout = timeout;
  comm->bytes = (sizeof(header_t) + 4095) / 4096 * 4096 + (uint64_t)size * kChunk;
  comm->file = open(comm->path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  void* at = MAP_FAILED;
  if (comm->file >= 0 && !ftruncate(comm->file, (off_t)comm->bytes))
    at = mmap(NULL, comm->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, comm->file, 0);
  if (at == MAP_FAILED) {
    int status = cann_refuse(kSystemCall, "%s: %s", comm->path, strerror(errno));
    if (comm->file >= 0) close(comm->file);
    free(comm);
    return status;
  }
  comm->header = at;
  comm->data = (char*)at + comm->bytes - (uint64_t)size * kChunk;
  struct flock lock;
  lock_of(rank, &lock);
  fcntl(comm->file, F_OFD_SETLK, &lock);
  uint32_t* joined = &comm->header->joined;
  __atomic_add_fetch(joined, 1, __ATOMIC_ACQ_REL);
  wake(joined);
  double until = now() + connect_timeout();
  int status = kOk;
  for (uint32_t seen; !status && (seen = read_of(joined)) < size;)
    status = await(comm, joined, seen, until - now(), 0);
  if (!status) status = comm_meet(comm);
  if (rank == 0) unlink(comm->path);
  if (status) {
    comm_close(comm);
    return status;
  }
  *made = comm;
  return kOk;
}

int comm_close(comm_t* comm) {
  munmap(comm->header, comm->bytes);
  close(comm->file);
  free(comm);
  return kOk;
}

/* ---- from one rank to another: a file for each message, so that no sender waits for its receiver */

static void message(const comm_t* comm, uint32_t from, uint32_t to, uint32_t count, char* path, size_t room) {
  snprintf(path, room, "%s.%u-%u-%u", comm->path, from, to, count);
}

int comm_send(comm_t* comm, const void* from, uint64_t bytes, uint32_t to) {
  if (to >= comm->size) return cann_refuse(kParameter, "there is no rank %u", to);
  uint32_t* sent = &comm->header->sent[comm->rank][to];
  char path[320];
  message(comm, comm->rank, to, *sent, path, sizeof path);
  int file = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  int bad = file < 0;
  for (uint64_t done = 0; !bad && done < bytes;) {
    ssize_t written = write(file, (const char*)from + done, bytes - done);
    bad = written <= 0;
    done += bad ? 0 : (uint64_t)written;
  }
  if (file >= 0) close(file);
  if (bad) return cann_refuse(kSystemCall, "%s: %s", path, strerror(errno));
  __atomic_add_fetch(sent, 1, __ATOMIC_ACQ_REL);
  wake(sent);
  return kOk;
}

int comm_receive(comm_t* comm, void* to, uint64_t bytes, uint32_t from) {
  if (from >= comm->size) return cann_refuse(kParameter, "there is no rank %u", from);
  uint32_t* received = &comm->header->received[from][comm->rank];
  uint32_t* sent = &comm->header->sent[from][comm->rank];
  int status = await(comm, sent, *received, comm->timeout, 1);
  if (status) return status;
  char path[320];
  message(comm, from, comm->rank, *received, path, sizeof path);
  int file = open(path, O_RDONLY | O_CLOEXEC);
  uint64_t done = 0;
  for (ssize_t got = 1; file >= 0 && got > 0 && done < bytes; done += got > 0 ? (uint64_t)got : 0)
    got = read(file, (char*)to + done, bytes - done);
  char more;
  int fits = file >= 0 && done == bytes && read(file, &more, 1) == 0;
  if (file >= 0) close(file);
  unlink(path);
  ++*received;
  return fits ? kOk : cann_refuse(kParameter, "rank %u sent another number of bytes than %llu", from,
                                  (unsigned long long)bytes);
}
