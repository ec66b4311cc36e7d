/* HIP's runtime on the host's memory: kernels do nothing, every call is written down.

   FAKE_HIP_LOG    the file to write calls to
   FAKE_HIP_ARCH   the devices' architecture; gfx942:sramecc+:xnack- where it is not set
   FAKE_HIP_COUNT  the number of devices; 1 where it is not set
   FAKE_HIP_BYTES  memory of a device; 1 GiB where it is not set
   FAKE_HIP_FAIL   a function that fails, with FAKE_HIP_ERROR or 719 */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { kOutOfMemory = 2, kNoDevice = 100, kInvalidDevice = 101, kNotFound = 500, kFailure = 719 };
typedef struct { size_t bytes; size_t padding; } Header;
typedef struct { const unsigned char* code; } Module;
typedef struct { char name[256]; } Function;

static size_t used;
static int current;

static void note(const char* format, ...) {
  const char* path = getenv("FAKE_HIP_LOG");
  if (!path) return;
  FILE* log = fopen(path, "a");
  va_list arguments;
  va_start(arguments, format);
  vfprintf(log, format, arguments);
  va_end(arguments);
  fclose(log);
}

static int number(const char* name, int otherwise) {
  const char* text = getenv(name);
  return text ? atoi(text) : otherwise;
}

static size_t all_bytes(void) {
  const char* text = getenv("FAKE_HIP_BYTES");
  return text ? strtoull(text, NULL, 10) : (size_t)1 << 30;
}

static int fails(const char* function) {
  const char* failing = getenv("FAKE_HIP_FAIL");
  if (!failing || strcmp(failing, function) != 0) return 0;
  return number("FAKE_HIP_ERROR", kFailure);
}
#define MAY_FAIL if (fails(__func__)) return fails(__func__)

const char* hipGetErrorName(int error) {
  switch (error) {
    case kOutOfMemory: return "hipErrorOutOfMemory";
    case kNoDevice: return "hipErrorNoDevice";
    case kInvalidDevice: return "hipErrorInvalidDevice";
    case 209: return "hipErrorNoBinaryForGpu";
    case kNotFound: return "hipErrorNotFound";
    case kFailure: return "hipErrorLaunchFailure";
  }
  return "hipErrorUnknown";
}

int hipGetDeviceCount(int* count) {
  MAY_FAIL;
  *count = number("FAKE_HIP_COUNT", 1);
  return *count ? 0 : kNoDevice;
}
int hipSetDevice(int device) {
  MAY_FAIL;
  if (device < 0 || device >= number("FAKE_HIP_COUNT", 1)) return kInvalidDevice;
  current = device;
  return 0;
}
int hipDeviceGetName(char* name, int length, int device) {
  snprintf(name, length, "Fake Instinct %d", device);
  return 0;
}
/* As in ROCm 6: 1,472 bytes, the name first, the architecture far behind it. */
int hipGetDevicePropertiesR0600(void* properties, int device) {
  MAY_FAIL;
  const char* architecture = getenv("FAKE_HIP_ARCH");
  memset(properties, 0x2a, 1472);
  strcpy(properties, "AMD gfx like no other");
  memset((char*)properties + 1100, 0, 60);
  strcpy((char*)properties + 1160, architecture ? architecture : "gfx942:sramecc+:xnack-");
  return 0;
}
int hipDriverGetVersion(int* version) {
  *version = 60342131;
  return 0;
}
int hipMemGetInfo(size_t* free, size_t* total) {
  MAY_FAIL;
  *total = all_bytes();
  *free = all_bytes() - used;
  return 0;
}
int hipMalloc(void** address, size_t bytes) {
  MAY_FAIL;
  if (used + bytes > all_bytes()) return kOutOfMemory;
  char* memory = aligned_alloc(256, (bytes + 256 + 255) / 256 * 256);
  memset(memory, 0x7f, bytes + 256);
  ((Header*)memory)->bytes = bytes;
  *address = memory + 256;
  used += bytes;
  note("malloc %zu on %d\n", bytes, current);
  return 0;
}
int hipFree(void* address) {
  MAY_FAIL;
  char* memory = (char*)address - 256;
  used -= ((Header*)memory)->bytes;
  note("free %zu\n", ((Header*)memory)->bytes);
  free(memory);
  return 0;
}
int hipMemcpyAsync(void* to, const void* from, size_t bytes, int kind, void* stream) {
  MAY_FAIL;
  memcpy(to, from, bytes);
  note("copy %zu kind %d\n", bytes, kind);
  return 0;
}
int hipStreamSynchronize(void* stream) {
  MAY_FAIL;
  note("wait\n");
  return 0;
}
int hipModuleLoadData(void** module, const void* code) {
  MAY_FAIL;
  const unsigned char* elf = code;
  /* A shared library (3) for AMD's GPUs (224), HSA (64) with code objects of version 5 (3). */
  if (memcmp(elf, "\177ELF", 4) || elf[16] != 3 || elf[18] != 224 || elf[7] != 64 || elf[8] != 3)
    return 209;
  Module* loaded = malloc(sizeof(Module));
  loaded->code = elf;
  *module = loaded;
  note("load machine 0x%x\n", elf[48]);
  return 0;
}
int hipModuleGetFunction(void** function, void* module, const char* name) {
  MAY_FAIL;
  Function* found = malloc(sizeof(Function));
  snprintf(found->name, sizeof(found->name), "%s", name);
  *function = found;
  return 0;
}
int hipModuleLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads_x,
                          unsigned threads_y, unsigned threads_z, unsigned shared, void* stream,
                          void** parameters, void** extra) {
  MAY_FAIL;
  if (parameters || extra[0] != (void*)1 || extra[2] != (void*)2 || extra[4] != (void*)3) return 1;
  size_t bytes = *(size_t*)extra[3];
  note("launch %s grid %u %u %u block %u %u %u on %d arguments", ((Function*)function)->name, x, y,
       z, threads_x, threads_y, threads_z, current);
  for (size_t i = 0; i < bytes; ++i) note(" %02x", ((unsigned char*)extra[1])[i]);
  note("\n");
  return 0;
}
