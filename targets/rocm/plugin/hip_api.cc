#include "hip_api.h"

#include <dlfcn.h>
#include <tvm/ffi/error.h>

#include <cctype>
#include <vector>

namespace llmc::rocm {
namespace {

// The newest first; ROCm's own folder is not always one of the linker's.
constexpr const char* kLibraries[] = {
    "libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so.5",
    "libamdhip64.so",   "/opt/rocm/lib/libamdhip64.so",
};
// The structure of a device's properties has 1,472 bytes in ROCm 6 and has been growing.
constexpr size_t kPropertiesBytes = 1 << 14;

hipError (*get_properties)(void*, int) = nullptr;

std::string LoadLibrary() {
  void* library = nullptr;
  for (const char* name : kLibraries) {
    library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (library != nullptr) break;
  }
  if (library == nullptr) return "no HIP runtime (libamdhip64.so) is installed";
  std::string missing;
  auto find = [&](const char* name) {
    void* found = dlsym(library, name);
    if (found == nullptr) missing = name;
    return found;
  };
#define LLMC_FIND(name, parameters) name = reinterpret_cast<decltype(name)>(find(#name));
  LLMC_HIP_FUNCTIONS(LLMC_FIND)
#undef LLMC_FIND
  hipGetErrorName = reinterpret_cast<decltype(hipGetErrorName)>(find("hipGetErrorName"));
  // The name that ROCm 6 gave the function when the structure changed.
  void* properties = dlsym(library, "hipGetDevicePropertiesR0600");
  if (properties == nullptr) properties = find("hipGetDeviceProperties");
  get_properties = reinterpret_cast<decltype(get_properties)>(properties);
  if (!missing.empty()) return "the HIP runtime has no function " + missing;
  int count = 0;
  hipError result = hipGetDeviceCount(&count);
  if (result == kHipErrorNoDevice || (result == kHipSuccess && count == 0)) {
    return "the HIP runtime finds no device";
  }
  if (result != kHipSuccess) {
    return std::string("the HIP runtime does not start: ") + hipGetErrorName(result);
  }
  return "";
}

}  // namespace

#define LLMC_DEFINE(name, parameters) hipError(*name) parameters = nullptr;
LLMC_HIP_FUNCTIONS(LLMC_DEFINE)
#undef LLMC_DEFINE
const char* (*hipGetErrorName)(hipError) = nullptr;

const std::string& Problem() {
  static const std::string* problem = new std::string(LoadLibrary());
  return *problem;
}

std::string Architecture(int device) {
  // Where the name stands in the structure depends on the version. It begins with the name that
  // people know, which is no architecture; no other text in it begins with gfx and a digit.
  std::vector<char> properties(kPropertiesBytes, 0);
  Check(get_properties(properties.data(), device), "hipGetDeviceProperties");
  std::string text(properties.begin(), properties.end());
  for (size_t at = text.find("gfx"); at != std::string::npos; at = text.find("gfx", at + 1)) {
    bool begins = at == 0 || text[at - 1] == '\0';
    if (!begins || !std::isdigit(static_cast<unsigned char>(text[at + 3]))) continue;
    size_t end = at + 3;
    while (std::isxdigit(static_cast<unsigned char>(text[end]))) ++end;
    return text.substr(at, end - at);
  }
  TVM_FFI_THROW(RuntimeError) << "HIP: device " << device << " does not say its architecture";
}

void Check(hipError result, const std::string& what) {
  if (result == kHipSuccess) return;
  const char* name = hipGetErrorName(result);
  TVM_FFI_THROW(RuntimeError) << "HIP: " << (name == nullptr ? "an unknown error" : name) << ": "
                              << what;
}

}  // namespace llmc::rocm
