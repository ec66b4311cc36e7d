#include "vulkan_api.h"

#include <dlfcn.h>
#include <tvm/ffi/error.h>

#include <cstring>

namespace llmc::vulkan {

#define LLMC_DEFINE(name) PFN_##name name = nullptr;
PFN_vkGetInstanceProcAddr vkGetInstanceProcAddr = nullptr;
LLMC_VULKAN_GLOBAL_FUNCTIONS(LLMC_DEFINE)
LLMC_VULKAN_FUNCTIONS(LLMC_DEFINE)
#undef LLMC_DEFINE

std::string LoadLibrary() {
#ifdef __APPLE__
  const char* names[] = {"libvulkan.1.dylib", "libMoltenVK.dylib"};
#else
  const char* names[] = {"libvulkan.so.1"};
#endif
  void* library = nullptr;
  for (const char* name : names) {
    if (library == nullptr) library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
  }
  if (library == nullptr) return std::string("the Vulkan loader ") + names[0] + " is not installed";
  vkGetInstanceProcAddr =
      reinterpret_cast<PFN_vkGetInstanceProcAddr>(dlsym(library, "vkGetInstanceProcAddr"));
  if (vkGetInstanceProcAddr == nullptr) return "the Vulkan loader has no vkGetInstanceProcAddr";
#define LLMC_LOAD(name)                                                            \
  name = reinterpret_cast<PFN_##name>(vkGetInstanceProcAddr(nullptr, #name));      \
  if (name == nullptr) return "the Vulkan loader has no " #name ", it is too old";
  LLMC_VULKAN_GLOBAL_FUNCTIONS(LLMC_LOAD)
#undef LLMC_LOAD
  return "";
}

std::string LoadFunctions(VkInstance instance) {
#define LLMC_LOAD(name)                                                            \
  name = reinterpret_cast<PFN_##name>(vkGetInstanceProcAddr(instance, #name));     \
  if (name == nullptr) return "the Vulkan driver has no " #name ", it is too old";
  LLMC_VULKAN_FUNCTIONS(LLMC_LOAD)
#undef LLMC_LOAD
  return "";
}

std::string ResultName(VkResult result) {
#define LLMC_NAME(name) \
  case name:            \
    return #name;
  switch (result) {
    LLMC_NAME(VK_NOT_READY)
    LLMC_NAME(VK_TIMEOUT)
    LLMC_NAME(VK_INCOMPLETE)
    LLMC_NAME(VK_ERROR_OUT_OF_HOST_MEMORY)
    LLMC_NAME(VK_ERROR_OUT_OF_DEVICE_MEMORY)
    LLMC_NAME(VK_ERROR_INITIALIZATION_FAILED)
    LLMC_NAME(VK_ERROR_DEVICE_LOST)
    LLMC_NAME(VK_ERROR_MEMORY_MAP_FAILED)
    LLMC_NAME(VK_ERROR_LAYER_NOT_PRESENT)
    LLMC_NAME(VK_ERROR_EXTENSION_NOT_PRESENT)
    LLMC_NAME(VK_ERROR_FEATURE_NOT_PRESENT)
    LLMC_NAME(VK_ERROR_INCOMPATIBLE_DRIVER)
    LLMC_NAME(VK_ERROR_TOO_MANY_OBJECTS)
    LLMC_NAME(VK_ERROR_FRAGMENTED_POOL)
    LLMC_NAME(VK_ERROR_INVALID_SHADER_NV)
    LLMC_NAME(VK_ERROR_INVALID_OPAQUE_CAPTURE_ADDRESS)
    default:
      return "VkResult " + std::to_string(static_cast<int>(result));
  }
#undef LLMC_NAME
}

void Check(VkResult result, const char* what) {
  if (result == VK_SUCCESS) return;
  size_t length = std::strcspn(what, "(");
  TVM_FFI_THROW(RuntimeError) << "Vulkan: " << std::string(what, length) << " returned "
                              << ResultName(result);
}

}  // namespace llmc::vulkan
