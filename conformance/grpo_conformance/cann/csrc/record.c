/* Names of the calls that reached CANN, and the texts of its errors. */
#include "cann.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static char* text;
static size_t used, room;
static int on;
static __thread char problem[512];

/* Start with an empty record, or stop. */
void grpo_cann_record(int recording) {
  pthread_mutex_lock(&mutex);
  on = recording;
  used = 0;
  if (text) text[0] = 0;
  pthread_mutex_unlock(&mutex);
}

/* The names recorded so far, one a line. */
const char* grpo_cann_recorded(void) { return text ? text : ""; }

void cann_record(const char* name) {
  if (!on) return;
  pthread_mutex_lock(&mutex);
  size_t length = strlen(name);
  if (used + length + 2 > room) {
    room = 2 * (used + length + 2) + 4096;
    text = realloc(text, room);
  }
  memcpy(text + used, name, length);
  used += length;
  text[used++] = '\n';
  text[used] = 0;
  pthread_mutex_unlock(&mutex);
}

int cann_refuse(int status, const char* form, ...) {
  va_list words;
  va_start(words, form);
  int start = snprintf(problem, sizeof problem, "simulated CANN: ");
  vsnprintf(problem + start, sizeof problem - start, form, words);
  va_end(words);
  return status;
}

const char* aclGetRecentErrMsg(void) { return problem[0] ? problem : NULL; }
