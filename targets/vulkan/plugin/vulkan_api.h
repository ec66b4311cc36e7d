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
