// Vulkan's functions, found at run time: the plug-in loads where there is no driver.
#pragma once

#include <string>

#define VK_NO_PROTOTYPES
#include <vulkan/vulkan.h>

namespace llmc::vulkan {

#define LLMC_VULKAN_GLOBAL_FUNCTIONS(F) F(vkCreateInstance) F(vkEnumerateInstanceVersion)

#define LLMC_VULKAN_FUNCTIONS(F)                                                                  \
  F(vkDestroyInstance) F(vkEnumeratePhysicalDevices) F(vkEnumerateDeviceExtensionProperties)      \
  F(vkGetPhysicalDeviceProperties2) F(vkGetPhysicalDeviceFeatures2)                               \
  F(vkGetPhysicalDeviceMemoryProperties2) F(vkGetPhysicalDeviceQueueFamilyProperties)             \
  F(vkCreateDevice) F(vkDestroyDevice) F(vkDeviceWaitIdle) F(vkGetDeviceQueue) F(vkQueueSubmit)   \
  F(vkCreateBuffer) F(vkDestroyBuffer) F(vkGetBufferMemoryRequirements) F(vkBindBufferMemory)     \
  F(vkGetBufferDeviceAddress) F(vkAllocateMemory) F(vkFreeMemory) F(vkMapMemory)                  \
  F(vkCreateCommandPool) F(vkDestroyCommandPool) F(vkAllocateCommandBuffers)                      \
  F(vkResetCommandBuffer) F(vkBeginCommandBuffer) F(vkEndCommandBuffer) F(vkCmdPipelineBarrier)   \
  F(vkCmdCopyBuffer) F(vkCmdBindPipeline) F(vkCmdPushConstants) F(vkCmdDispatch)                  \
  F(vkCreateSemaphore) F(vkDestroySemaphore) F(vkWaitSemaphores)                                  \
  F(vkCreatePipelineCache) F(vkDestroyPipelineCache) F(vkGetPipelineCacheData)                    \
  F(vkCreateShaderModule) F(vkDestroyShaderModule) F(vkCreatePipelineLayout)                      \
  F(vkDestroyPipelineLayout) F(vkCreateComputePipelines) F(vkDestroyPipeline)

// VK_KHR_cooperative_matrix, as its specification has it: headers older than 1.3.255 do not.
namespace cooperative_matrix {
constexpr char kExtension[] = "VK_KHR_cooperative_matrix";
constexpr auto kFeaturesType = static_cast<VkStructureType>(1000506000);
constexpr auto kPropertiesType = static_cast<VkStructureType>(1000506001);
constexpr int32_t kFloat16 = 0, kFloat32 = 1;  // VkComponentTypeKHR
constexpr int32_t kSubgroup = 3;               // VkScopeKHR
struct Features {
  VkStructureType sType = kFeaturesType;
  void* pNext = nullptr;
  VkBool32 cooperativeMatrix = VK_FALSE;
  VkBool32 cooperativeMatrixRobustBufferAccess = VK_FALSE;
};
struct Properties {
  VkStructureType sType = kPropertiesType;
  void* pNext = nullptr;
  uint32_t MSize = 0, NSize = 0, KSize = 0;
  int32_t AType = 0, BType = 0, CType = 0, ResultType = 0;
  VkBool32 saturatingAccumulation = VK_FALSE;
  int32_t scope = 0;
};
using GetProperties = VkResult(VKAPI_PTR*)(VkPhysicalDevice, uint32_t*, Properties*);
}  // namespace cooperative_matrix

#define LLMC_DECLARE(name) extern PFN_##name name;
extern PFN_vkGetInstanceProcAddr vkGetInstanceProcAddr;
LLMC_VULKAN_GLOBAL_FUNCTIONS(LLMC_DECLARE)
LLMC_VULKAN_FUNCTIONS(LLMC_DECLARE)
#undef LLMC_DECLARE

// Finds the loader and the functions that need no instance; what is wrong, or "".
std::string LoadLibrary();

// Finds the others; what is wrong, or "".
std::string LoadFunctions(VkInstance instance);

// Vulkan's own name of a result, such as VK_ERROR_DEVICE_LOST.
std::string ResultName(VkResult result);

// Throws RuntimeError with the name of the result and of the function, unless it succeeded.
void Check(VkResult result, const char* what);

#define LLMC_CHECK(call) ::llmc::vulkan::Check(call, #call)

}  // namespace llmc::vulkan
