/* The thread pool of a compiled CPU library; linked into it, so it needs nothing where it runs.
 *
 * A parallel loop of a kernel is a call of TVMBackendParallelLaunch(lambda, closure, 0) through a
 * pointer in the library, which TVM sets when it loads the library and set_threads() below sets
 * again. The lambda computes its share of the loop from (task, num_task), so the pool is free to
 * ask for more tasks than it has threads and to hand them out as threads come: a slow or interrupted
 * core takes fewer, and a thread that does not come in time is not waited for.
 *
 * One launch at a time. Every thread has a share of its tasks, the same one in each launch, so that
 * it finds in its core's cache what it left there; when that is done it helps with the others' shares,
 * from their ends, which their threads come to last.
 *
 *     shares[t]        none -> a … b    the launching thread, after it wrote the job
 *                      -> a + 1 … b     its thread, which takes the task a
 *                      -> a … b - 1     another, which takes the task b - 1
 *     unfinished       n -> 0           every thread subtracts what it did when it finds no more
 *
 * A task that is claimed and not finished keeps the job from being replaced, so the job is read
 * after a claim only. A claim succeeds for the launch of that moment, whichever it is: a thread that
 * slept through several launches does no harm.
 */
#define _GNU_SOURCE /* pthread_setname_np */
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

#include <tvm/ffi/c_api.h>

enum {
  TASKS_PER_THREAD = 8, /* the more, the evener a loop is shared out */
  WORKER_SPIN_US = 1000, /* how long an idle worker looks for work before it sleeps */
  LAUNCH_SPIN_US = 20,  /* how long a launch waits for the last tasks before it yields its core */
  PAUSES_PER_LOOK = 16, /* pauses between two looks at the clock */
  MAX_THREADS = 1024,
  STACK_BYTES = 8 << 20, /* the main thread's usual size: kernels keep their tiles on the stack */
  CACHE_LINE = 128,      /* two lines on x86, which fetches them in pairs; one on Apple's cores */
};

/* tvm/runtime/c_backend_api.h, which needs C++ */
typedef struct {
  void *sync_handle;
  int32_t num_task;
} TVMParallelGroupEnv;
typedef int (*FTVMParallelLambda)(int task_id, TVMParallelGroupEnv *env, void *closure);

/* Weak: a library without a parallel loop has no such pointer. */
extern __attribute__((weak)) int (*__TVMBackendParallelLaunch)(FTVMParallelLambda, void *, int);

#define EXPORT __attribute__((visibility("default")))

typedef struct {
  _Alignas(CACHE_LINE) atomic_ullong open; /* the task after the last << 32 | the first unclaimed */
} Share;

static Share shares[MAX_THREADS];

static struct {
  _Alignas(CACHE_LINE) atomic_uint launches; /* beside the job, which is read next */
  FTVMParallelLambda lambda;
  void *closure;
  TVMParallelGroupEnv env;
  int num_threads; /* the launching one included; changed while there are no workers */

  _Alignas(CACHE_LINE) atomic_uint unfinished;
  atomic_int failure; /* what the first task that failed returned */
  TVMFFIObjectHandle error; /* and its error, taken from its thread */

  _Alignas(CACHE_LINE) atomic_bool asleep; /* a worker may be waiting for `wake` */
  atomic_bool stopping;                    /* workers return */
  int num_workers;                         /* that run; guarded by `launching` */
  pthread_t workers[MAX_THREADS];
} pool = {.num_threads = 1};

static pthread_mutex_t launching = PTHREAD_MUTEX_INITIALIZER; /* held for a whole launch */
static pthread_mutex_t sleeping = PTHREAD_MUTEX_INITIALIZER;  /* guards the wait for `wake` */
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
/* Not null on a thread that runs tasks: what it launches is run serially. No _Thread_local, whose
 * first use on a thread may take the loader's lock, which leave() is called under. */
static pthread_key_t inside_task;

static void pause_briefly(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("isb"); /* yield is no pause on cores without hardware threads */
#endif
}

static int64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

/* Whether `counter` became `value` (or, not `equal`, another) within `us` microseconds. */
static bool spin_until(atomic_uint *counter, bool equal, unsigned value, int us) {
  int64_t deadline = 0;
  do {
    for (int i = 0; i < PAUSES_PER_LOOK; ++i) {
      if ((atomic_load_explicit(counter, memory_order_acquire) == value) == equal) return true;
      pause_briefly();
    }
    if (deadline == 0) deadline = now_ns() + us * INT64_C(1000);
  } while (now_ns() < deadline);
  return false;
}

/* Keeps the first failure; an error object lives in the thread that raised it, so it is moved. */
static void keep_failure(int code) {
  int none = 0;
  if (atomic_compare_exchange_strong(&pool.failure, &none, code)) {
    TVMFFIErrorMoveFromRaised(&pool.error);
  }
}

/* A task of a share, or -1: the next, upwards, as memory is prefetched (kernels stream weights, and
 * downwards they take twice as long), or the last. */
static int claim(Share *share, bool last) {
  unsigned long long open = atomic_load_explicit(&share->open, memory_order_relaxed);
  for (;;) {
    unsigned first = (unsigned)open, end = (unsigned)(open >> 32);
    if (first >= end) return -1;
    unsigned long long rest = last ? open - (1ull << 32) : open + 1;
    if (atomic_compare_exchange_weak_explicit(&share->open, &open, rest, memory_order_acquire,
                                              memory_order_relaxed)) {
      return (int)(last ? end - 1 : first);
    }
  }
}

/* Takes tasks of the present launch until none is left, those of thread `number` first. */
static void run_tasks(int number) {
  int done = 0;
  for (int i = 0; i < pool.num_threads; ++i) {
    Share *share = &shares[(number + i) % pool.num_threads];
    for (int task = claim(share, i > 0); task >= 0; task = claim(share, i > 0)) {
      int code = pool.lambda(task, &pool.env, pool.closure);
      if (code != 0) keep_failure(code);
      ++done;
    }
  }
  if (done > 0) atomic_fetch_sub_explicit(&pool.unfinished, done, memory_order_release);
}

static void *work(void *number) {
  char name[16]; /* Linux's limit */
  snprintf(name, sizeof name, "llmc-worker-%d", (int)(intptr_t)number);
#if defined(__APPLE__)
  pthread_setname_np(name);
#else
  pthread_setname_np(pthread_self(), name);
#endif
  pthread_setspecific(inside_task, &pool);
  unsigned seen = 0;
  while (!atomic_load(&pool.stopping)) {
    if (!spin_until(&pool.launches, false, seen, WORKER_SPIN_US)) {
      /* Either the launching thread sees `asleep`, or this thread sees its launch: both sides write
       * first and read then, in one order for all (sequentially consistent). */
      pthread_mutex_lock(&sleeping);
      atomic_store(&pool.asleep, true);
      if (atomic_load(&pool.launches) == seen) pthread_cond_wait(&wake, &sleeping);
      pthread_mutex_unlock(&sleeping);
      continue; /* spin before the next sleep: launches come in dozens */
    }
    seen = atomic_load(&pool.launches);
    run_tasks((int)(intptr_t)number);
  }
  return NULL;
}

/* Tells the workers of a launch, or that they are to return. */
static void announce(void) {
  atomic_fetch_add(&pool.launches, 1);
  if (atomic_load(&pool.asleep)) {
    pthread_mutex_lock(&sleeping);
    atomic_store(&pool.asleep, false);
    pthread_cond_broadcast(&wake);
    pthread_mutex_unlock(&sleeping);
  }
}

/* Shares `num_tasks` tasks out. */
static void publish(int num_tasks) {
  atomic_store_explicit(&pool.unfinished, num_tasks, memory_order_relaxed);
  unsigned long long begin = 0;
  for (int t = 0; t < pool.num_threads; ++t) {
    unsigned long long end = (unsigned long long)num_tasks * (t + 1) / pool.num_threads;
    atomic_store_explicit(&shares[t].open, end << 32 | begin, memory_order_release);
    begin = end;
  }
  announce();
}

/* In a forked child: its threads are gone, and the locks they held are held for ever. */
static void forget_workers(void) {
  for (int t = 0; t < pool.num_threads; ++t) atomic_store(&shares[t].open, 0);
  atomic_store(&pool.failure, 0);
  atomic_store(&pool.asleep, false);
  atomic_store(&pool.stopping, false);
  pool.num_workers = 0;
  launching = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
  sleeping = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
  wake = (pthread_cond_t)PTHREAD_COND_INITIALIZER;
}

/* Starts what is missing of the workers; a system that refuses threads is served by fewer. */
static void start_workers(void) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setstacksize(&attributes, STACK_BYTES);
  pthread_sigmask(SIG_SETMASK, &all, &before); /* inherited: signals are the program's affair */
  while (pool.num_workers < pool.num_threads - 1) {
    intptr_t number = pool.num_workers + 1;
    if (pthread_create(&pool.workers[number - 1], &attributes, work, (void *)number) != 0) break;
    ++pool.num_workers;
  }
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  pthread_attr_destroy(&attributes);
  pool.num_threads = pool.num_workers + 1;
}

static void stop_workers(void) {
  atomic_store(&pool.stopping, true);
  announce();
  for (int i = 0; i < pool.num_workers; ++i) pthread_join(pool.workers[i], NULL);
  pool.num_workers = 0;
  atomic_store(&pool.stopping, false);
}

/* A forked child starts its own workers. The handler that sees to it has to go with the library,
 * which pthread_atfork does not promise. glibc removes the handlers of a library when that calls
 * __cxa_finalize, as GCC's start files do, but not zig's. Apple's stay; its getpid() is no system
 * call, and so can be asked at every launch. */
#if defined(__APPLE__)
static pid_t owner;
static void watch_forks(void) { owner = getpid(); }
static void unwatch_forks(void) {}
static void notice_fork(void) {
  if (owner == getpid()) return;
  owner = getpid();
  forget_workers();
}
#else
extern __attribute__((visibility("hidden"))) void *__dso_handle;
extern int __register_atfork(void (*)(void), void (*)(void), void (*)(void), void *);
extern void __cxa_finalize(void *);
static void watch_forks(void) { __register_atfork(NULL, NULL, forget_workers, &__dso_handle); }
static void unwatch_forks(void) { __cxa_finalize(&__dso_handle); }
static void notice_fork(void) {}
#endif

static __attribute__((constructor)) void enter(void) {
  pthread_key_create(&inside_task, NULL);
  watch_forks();
}

/* When the library is unloaded its workers must not be running its code. At exit another thread may
 * be in a launch: the process ends without waiting for it. */
static __attribute__((destructor)) void leave(void) {
  notice_fork();
  if (pthread_mutex_trylock(&launching) != 0) return;
  stop_workers();
  pool.num_threads = 1; /* launches by threads that outlive exit() start no workers again */
  pthread_mutex_unlock(&launching);
  pthread_key_delete(inside_task);
  unwatch_forks();
}

static int run_serially(FTVMParallelLambda lambda, void *closure, int num_task) {
  TVMParallelGroupEnv env = {.num_task = num_task};
  for (int task = 0; task < num_task; ++task) {
    int code = lambda(task, &env, closure);
    if (code != 0) return code;
  }
  return 0;
}

/* TVMBackendParallelLaunch: returns 0, or what the first task that failed returned, whose error is
 * then the calling thread's. Callers from several threads wait for each other. */
EXPORT int llmc_parallel_launch(FTVMParallelLambda lambda, void *closure, int num_task) {
  notice_fork();
  if (pthread_getspecific(inside_task) != NULL) {
    return run_serially(lambda, closure, num_task > 0 ? num_task : 1);
  }
  pthread_mutex_lock(&launching);
  if (pool.num_workers < pool.num_threads - 1) start_workers();
  if (pool.num_workers == 0) {
    pthread_mutex_unlock(&launching);
    return run_serially(lambda, closure, num_task > 0 ? num_task : 1);
  }
  if (num_task <= 0) num_task = pool.num_threads * TASKS_PER_THREAD;
  pool.lambda = lambda;
  pool.closure = closure;
  pool.env = (TVMParallelGroupEnv){.num_task = num_task};
  publish(num_task);
  pthread_setspecific(inside_task, &pool);
  run_tasks(0);
  pthread_setspecific(inside_task, NULL);
  while (!spin_until(&pool.unfinished, true, 0, LAUNCH_SPIN_US)) sched_yield();
  int code = atomic_load_explicit(&pool.failure, memory_order_relaxed);
  if (code != 0) {
    atomic_store_explicit(&pool.failure, 0, memory_order_relaxed);
    if (pool.error != NULL) {
      TVMFFIErrorSetRaised(pool.error);
      TVMFFIObjectDecRef(pool.error);
      pool.error = NULL;
    }
  }
  pthread_mutex_unlock(&launching);
  return code;
}

/* set_threads(num_threads: int): the library's parallel loops run on this many threads of its own,
 * the calling one included. A function of the module, by the calling convention of TVM's FFI. */
EXPORT int __tvm_ffi_llmc_set_threads(void *self, const TVMFFIAny *args, int32_t num_args,
                                      TVMFFIAny *result) {
  (void)self;
  (void)result; /* None, as the caller set it */
  if (num_args != 1 || args[0].type_index != kTVMFFIInt || args[0].v_int64 < 1 ||
      args[0].v_int64 > MAX_THREADS) {
    TVMFFIErrorSetRaisedFromCStr("ValueError", "llmc_set_threads takes a number from 1 to 1024");
    return -1;
  }
  notice_fork();
  pthread_mutex_lock(&launching);
  if (pool.num_threads != args[0].v_int64) {
    stop_workers();
    pool.num_threads = (int)args[0].v_int64;
  }
  if (&__TVMBackendParallelLaunch != NULL) __TVMBackendParallelLaunch = llmc_parallel_launch;
  pthread_mutex_unlock(&launching);
  return 0;
}
