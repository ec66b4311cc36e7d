/* Runs one compiled kernel on arrays from a file: DRIVER KERNEL INPUT OUTPUT.
 *
 * INPUT: the number of arrays, then for each its type's code and bits, its number of dimensions and
 * those, all int64, and its bytes. OUTPUT: the bytes of the last array. FUNCTIONS lists the kernels
 * as F(name) F(name) … */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <tvm/ffi/c_api.h>

enum { MAX_ARRAYS = 16, MAX_DIMENSIONS = 4, ALIGNMENT = 64 };

typedef struct {
  void *sync_handle;
  int32_t num_task;
} Environment;
typedef int (*Lambda)(int, Environment *, void *);
extern int (*__TVMBackendParallelLaunch)(Lambda, void *, int);

static int launch(Lambda lambda, void *closure, int num_task) {
  Environment environment = {.num_task = num_task > 0 ? num_task : 3};
  for (int task = 0; task < environment.num_task; ++task) {
    int code = lambda(task, &environment, closure);
    if (code != 0) return code;
  }
  return 0;
}

void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
  fprintf(stderr, "%s: ", kind);
  for (int i = 0; i < count; ++i) fputs(parts[i], stderr);
  fputc('\n', stderr);
}

#define F(NAME) \
  int __tvm_ffi_##NAME(void *, const TVMFFIAny *, int32_t, TVMFFIAny *);
FUNCTIONS
#undef F
#define F(NAME) {#NAME, __tvm_ffi_##NAME},
static const struct {
  const char *name;
  int (*call)(void *, const TVMFFIAny *, int32_t, TVMFFIAny *);
} functions[] = {FUNCTIONS};

static void fail(const char *what) {
  fprintf(stderr, "%s\n", what);
  exit(2);
}

static int64_t number(FILE *file) {
  int64_t value;
  if (fread(&value, sizeof value, 1, file) != 1) fail("the input is too short");
  return value;
}

int main(int argc, char **argv) {
  if (argc != 4) fail("expected KERNEL INPUT OUTPUT");
  FILE *input = fopen(argv[2], "rb");
  if (input == NULL) fail("no input");
  static DLTensor tensors[MAX_ARRAYS];
  static int64_t shapes[MAX_ARRAYS][MAX_DIMENSIONS];
  static TVMFFIAny arguments[MAX_ARRAYS];
  int count = number(input);
  if (count < 1 || count > MAX_ARRAYS) fail("too many arrays");
  size_t bytes = 0;
  for (int i = 0; i < count; ++i) {
    DLTensor *t = &tensors[i];
    t->device.device_type = kDLCPU;
    t->dtype.code = number(input);
    t->dtype.bits = number(input);
    t->dtype.lanes = 1;
    t->ndim = number(input);
    if (t->ndim > MAX_DIMENSIONS) fail("too many dimensions");
    t->shape = shapes[i];
    bytes = t->dtype.bits / 8;
    for (int d = 0; d < t->ndim; ++d) bytes *= t->shape[d] = number(input);
    t->data = aligned_alloc(ALIGNMENT, (bytes + ALIGNMENT) / ALIGNMENT * ALIGNMENT);
    if (fread(t->data, 1, bytes, input) != bytes) fail("the input is too short");
    arguments[i].type_index = kTVMFFIDLTensorPtr;
    arguments[i].v_ptr = t;
  }
  __TVMBackendParallelLaunch = launch;
  for (size_t f = 0; f < sizeof functions / sizeof functions[0]; ++f) {
    if (strcmp(functions[f].name, argv[1]) != 0) continue;
    TVMFFIAny result;
    memset(&result, 0, sizeof result);
    if (functions[f].call(NULL, arguments, count, &result) != 0) return 1;
    FILE *output = fopen(argv[3], "wb");
    if (output == NULL || fwrite(tensors[count - 1].data, 1, bytes, output) != bytes ||
        fclose(output) != 0) {
      fail("no output");
    }
    return 0;
  }
  fail("no such kernel");
}
