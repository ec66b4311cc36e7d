// A Vulkan layer that makes a device look like a lesser or a better one, as the environment says:
//
//   LLMC_TEST_WITHOUT    names of features that it is to lack, separated by commas
//   LLMC_TEST_HEAP_BYTES the size of its memory, also of its largest allocation
//   LLMC_TEST_LOST_AT    the number of the submission, from 1 on, at which it is lost
//   LLMC_TEST_MATRICES   "1": it has cooperative matrices, subgroups of 8 to 32 threads
//
// What it pretends to have is only seen, not run.
#include <stdlib.h>
#include <string.h>
#include <vulkan/vk_layer.h>
#include <vulkan/vulkan.h>

static PFN_vkGetInstanceProcAddr next_instance;
static PFN_vkGetDeviceProcAddr next_device;
static VkInstance the_instance;

// Looked up when the instance is made: later the loader answers with the whole chain of layers.
#define FUNCTIONS(F)                                                          \
  F(vkEnumerateDeviceExtensionProperties) F(vkGetPhysicalDeviceFeatures2)     \
  F(vkGetPhysicalDeviceMemoryProperties2) F(vkGetPhysicalDeviceProperties2)
#define DECLARE(name) static PFN_##name next_##name;
FUNCTIONS(DECLARE)
#define NEXT(name) next_##name

static const char* option(const char* name) {
  const char* value = getenv(name);
  return value == NULL ? "" : value;
}

static int is_named(const char* feature) {
  const char* names = option("LLMC_TEST_WITHOUT");
  size_t length = strlen(feature);
  for (const char* at = strstr(names, feature); at != NULL; at = strstr(at + 1, feature)) {
    if ((at == names || at[-1] == ',') && (at[length] == 0 || at[length] == ',')) return 1;
  }
  return 0;
}

static int has_matrices(void) { return option("LLMC_TEST_MATRICES")[0] == '1'; }

static VkDeviceSize heap_bytes(VkDeviceSize real) {
  const char* text = option("LLMC_TEST_HEAP_BYTES");
  return text[0] ? strtoull(text, NULL, 10) : real;
}

// VK_KHR_cooperative_matrix is newer than some headers.
struct MatrixFeatures {
  VkStructureType sType;
  void* pNext;
  VkBool32 has, robust;
};
struct MatrixProperties {
  VkStructureType sType;
  void* pNext;
  uint32_t m, n, k;
  int32_t a, b, c, result;
  VkBool32 saturating;
  int32_t scope;
};

static VKAPI_ATTR void VKAPI_CALL features2(VkPhysicalDevice device,
                                            VkPhysicalDeviceFeatures2* features) {
  NEXT(vkGetPhysicalDeviceFeatures2)(device, features);
  for (VkBaseOutStructure* at = (VkBaseOutStructure*)features; at != NULL; at = at->pNext) {
    if (at->sType == VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_2_FEATURES) {
      VkPhysicalDeviceVulkan12Features* v12 = (VkPhysicalDeviceVulkan12Features*)at;
      if (is_named("shaderFloat16")) v12->shaderFloat16 = VK_FALSE;
      if (is_named("bufferDeviceAddress")) v12->bufferDeviceAddress = VK_FALSE;
    } else if (at->sType == (VkStructureType)1000506000 && has_matrices()) {
      ((struct MatrixFeatures*)at)->has = VK_TRUE;
    }
  }
}

static VKAPI_ATTR void VKAPI_CALL properties2(VkPhysicalDevice device,
                                              VkPhysicalDeviceProperties2* properties) {
  NEXT(vkGetPhysicalDeviceProperties2)(device, properties);
  for (VkBaseOutStructure* at = (VkBaseOutStructure*)properties; at != NULL; at = at->pNext) {
    if (at->sType == VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_1_PROPERTIES) {
      VkPhysicalDeviceVulkan11Properties* v11 = (VkPhysicalDeviceVulkan11Properties*)at;
      v11->maxMemoryAllocationSize = heap_bytes(v11->maxMemoryAllocationSize);
    } else if (at->sType ==
                   VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SUBGROUP_SIZE_CONTROL_PROPERTIES &&
               has_matrices()) {
      ((VkPhysicalDeviceSubgroupSizeControlProperties*)at)->maxSubgroupSize = 32;
    }
  }
}

static VKAPI_ATTR void VKAPI_CALL memory2(VkPhysicalDevice device,
                                          VkPhysicalDeviceMemoryProperties2* memory) {
  NEXT(vkGetPhysicalDeviceMemoryProperties2)(device, memory);
  VkPhysicalDeviceMemoryProperties* found = &memory->memoryProperties;
  for (uint32_t i = 0; i < found->memoryHeapCount; ++i) {
    found->memoryHeaps[i].size = heap_bytes(found->memoryHeaps[i].size);
  }
  for (VkBaseOutStructure* at = memory->pNext; at != NULL; at = at->pNext) {
    if (at->sType != VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MEMORY_BUDGET_PROPERTIES_EXT) continue;
    VkPhysicalDeviceMemoryBudgetPropertiesEXT* budget =
        (VkPhysicalDeviceMemoryBudgetPropertiesEXT*)at;
    for (uint32_t i = 0; i < found->memoryHeapCount; ++i) {
      budget->heapBudget[i] = heap_bytes(budget->heapBudget[i]);
    }
  }
}

static VKAPI_ATTR VkResult VKAPI_CALL extensions(VkPhysicalDevice device, const char* layer,
                                                 uint32_t* count,
                                                 VkExtensionProperties* properties) {
  PFN_vkEnumerateDeviceExtensionProperties next = NEXT(vkEnumerateDeviceExtensionProperties);
  if (!has_matrices() || layer != NULL) return next(device, layer, count, properties);
  uint32_t room = *count;
  if (properties == NULL) {
    VkResult result = next(device, layer, count, NULL);
    *count += 1;
    return result;
  }
  if (room == 0) return VK_INCOMPLETE;
  *count = room - 1;
  VkResult result = next(device, layer, count, properties);
  strcpy(properties[*count].extensionName, "VK_KHR_cooperative_matrix");
  properties[(*count)++].specVersion = 2;
  return result;
}

static VKAPI_ATTR VkResult VKAPI_CALL matrices(VkPhysicalDevice device, uint32_t* count,
                                               struct MatrixProperties* found) {
  (void)device;
  if (found != NULL) {
    struct MatrixProperties other = {found[0].sType, NULL, 16, 8, 8, 0, 0, 0, 0, VK_FALSE, 3};
    struct MatrixProperties ours = {found[1].sType, NULL, 16, 16, 16, 0, 0, 1, 1, VK_FALSE, 3};
    found[0] = other;
    found[1] = ours;
  }
  *count = 2;
  return VK_SUCCESS;
}

static PFN_vkQueueSubmit real_submit;

static VKAPI_ATTR VkResult VKAPI_CALL counted_submit(VkQueue queue, uint32_t count,
                                                     const VkSubmitInfo* submits, VkFence fence) {
  static unsigned long number;
  unsigned long lost = strtoul(option("LLMC_TEST_LOST_AT"), NULL, 10);
  if (lost != 0 && ++number >= lost) return VK_ERROR_DEVICE_LOST;
  return real_submit(queue, count, submits, fence);
}

static PFN_vkCreateBuffer real_buffer;

// Where the memory is pretended, buffers beyond 2 GiB are small ones.
static VKAPI_ATTR VkResult VKAPI_CALL pretended_buffer(VkDevice device,
                                                       const VkBufferCreateInfo* info,
                                                       const VkAllocationCallbacks* allocator,
                                                       VkBuffer* buffer) {
  VkBufferCreateInfo real = *info;
  if (option("LLMC_TEST_HEAP_BYTES")[0] && real.size > 1ull << 31) real.size = 1 << 20;
  return real_buffer(device, &real, allocator, buffer);
}

static VKAPI_ATTR VkResult VKAPI_CALL create_device(VkPhysicalDevice physical,
                                                    const VkDeviceCreateInfo* info,
                                                    const VkAllocationCallbacks* allocator,
                                                    VkDevice* device) {
  VkLayerDeviceCreateInfo* link = (VkLayerDeviceCreateInfo*)info->pNext;
  while (link->sType != VK_STRUCTURE_TYPE_LOADER_DEVICE_CREATE_INFO ||
         link->function != VK_LAYER_LINK_INFO) {
    link = (VkLayerDeviceCreateInfo*)link->pNext;
  }
  PFN_vkGetInstanceProcAddr get = link->u.pLayerInfo->pfnNextGetInstanceProcAddr;
  next_device = link->u.pLayerInfo->pfnNextGetDeviceProcAddr;
  link->u.pLayerInfo = link->u.pLayerInfo->pNext;
  PFN_vkCreateDevice next = (PFN_vkCreateDevice)get(the_instance, "vkCreateDevice");
  VkResult result = next(physical, info, allocator, device);
  if (result == VK_SUCCESS) {
    real_submit = (PFN_vkQueueSubmit)next_device(*device, "vkQueueSubmit");
    real_buffer = (PFN_vkCreateBuffer)next_device(*device, "vkCreateBuffer");
  }
  return result;
}

static VKAPI_ATTR VkResult VKAPI_CALL create_instance(const VkInstanceCreateInfo* info,
                                                      const VkAllocationCallbacks* allocator,
                                                      VkInstance* instance) {
  VkLayerInstanceCreateInfo* link = (VkLayerInstanceCreateInfo*)info->pNext;
  while (link->sType != VK_STRUCTURE_TYPE_LOADER_INSTANCE_CREATE_INFO ||
         link->function != VK_LAYER_LINK_INFO) {
    link = (VkLayerInstanceCreateInfo*)link->pNext;
  }
  next_instance = link->u.pLayerInfo->pfnNextGetInstanceProcAddr;
  link->u.pLayerInfo = link->u.pLayerInfo->pNext;
  PFN_vkCreateInstance next = (PFN_vkCreateInstance)next_instance(NULL, "vkCreateInstance");
  VkResult result = next(info, allocator, instance);
  the_instance = *instance;
  if (result != VK_SUCCESS) return result;
#define FIND(name) next_##name = (PFN_##name)next_instance(the_instance, #name);
  FUNCTIONS(FIND)
  return result;
}

static PFN_vkVoidFunction get_device(VkDevice device, const char* name) {
  if (strcmp(name, "vkGetDeviceProcAddr") == 0) return (PFN_vkVoidFunction)get_device;
  if (strcmp(name, "vkQueueSubmit") == 0) return (PFN_vkVoidFunction)counted_submit;
  if (strcmp(name, "vkCreateBuffer") == 0) return (PFN_vkVoidFunction)pretended_buffer;
  return next_device(device, name);
}

static PFN_vkVoidFunction get_physical(VkInstance instance, const char* name) {
  (void)instance;
  int ours = strcmp(name, "vkGetPhysicalDeviceCooperativeMatrixPropertiesKHR") == 0;
  return ours && has_matrices() ? (PFN_vkVoidFunction)matrices : NULL;
}

static PFN_vkVoidFunction get_instance(VkInstance instance, const char* name) {
  static const struct {
    const char* name;
    void* function;
  } ours[] = {
      {"vkCreateInstance", create_instance},
      {"vkCreateDevice", create_device},
      {"vkEnumerateDeviceExtensionProperties", extensions},
      {"vkGetDeviceProcAddr", get_device},
      {"vkGetInstanceProcAddr", get_instance},
      {"vkGetPhysicalDeviceFeatures2", features2},
      {"vkGetPhysicalDeviceMemoryProperties2", memory2},
      {"vkGetPhysicalDeviceProperties2", properties2},
  };
  for (size_t i = 0; i < sizeof(ours) / sizeof(ours[0]); ++i) {
    if (strcmp(name, ours[i].name) == 0) return (PFN_vkVoidFunction)ours[i].function;
  }
  PFN_vkVoidFunction physical = get_physical(instance, name);
  if (physical != NULL || next_instance == NULL) return physical;
  return next_instance(instance, name);
}

VK_LAYER_EXPORT VKAPI_ATTR VkResult VKAPI_CALL
vkNegotiateLoaderLayerInterfaceVersion(VkNegotiateLayerInterface* interface) {
  interface->loaderLayerInterfaceVersion = 2;
  interface->pfnGetInstanceProcAddr = get_instance;
  interface->pfnGetDeviceProcAddr = get_device;
  interface->pfnGetPhysicalDeviceProcAddr = get_physical;
  return VK_SUCCESS;
}
