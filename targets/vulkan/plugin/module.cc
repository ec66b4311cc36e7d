#include "module.h"

#include <tvm/ffi/cast.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/function.h>

#include <array>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "device.h"
#include "reader.h"

namespace llmc::vulkan {
namespace {

namespace ffi = tvm::ffi;

constexpr char kMagic[] = "LLMCVK02";
constexpr uint32_t kSpirvMagic = 0x07230203;
constexpr uint32_t kFoldsX = 1;
constexpr uint32_t kArgumentsInBuffer = 2;
constexpr int64_t kMaxElements = 1ll << 31;  // kernels compute indices in 32 bits

// How an argument's 8 bytes are filled.
enum class Kind { kPointer, kIndex, kInteger, kFloat };

struct Argument {
  Kind kind;
  int64_t element_bytes = 0;  // of a pointee
};

struct Kernel {
  std::string name, code;
  std::vector<Argument> arguments;
  std::vector<int> launch;  // the axis of the grid that each extent sets, -1 for the threads'
  bool folds_x = false, in_buffer = false;
  Device::Subgroups subgroups;
  std::map<int, Device::Pipeline> pipelines;  // by device
};

Argument ParseArgument(const std::string& text) {
  if (text[0] == 'p') return {Kind::kPointer, std::atoll(text.c_str() + 1)};
  if (text == "index") return {Kind::kIndex};
  return {text.rfind("float", 0) == 0 ? Kind::kFloat : Kind::kInteger};
}

int ParseAxis(const std::string& tag) {
  return tag.rfind("blockIdx.", 0) == 0 ? tag.back() - 'x' : -1;
}

std::shared_ptr<Kernel> ParseKernel(Reader& reader, uint32_t subgroup) {
  auto kernel = std::make_shared<Kernel>();
  kernel->name = reader.String();
  for (const std::string& text : reader.Strings()) {
    kernel->arguments.push_back(ParseArgument(text));
  }
  for (const std::string& tag : reader.Strings()) kernel->launch.push_back(ParseAxis(tag));
  uint32_t flags = reader.Number();
  kernel->folds_x = flags & kFoldsX;
  kernel->in_buffer = flags & kArgumentsInBuffer;
  uint32_t threads_x = reader.Number();
  reader.Bytes(8);  // the workgroup's other extents: the code has them too
  kernel->subgroups = {subgroup, subgroup > 1 && threads_x % subgroup == 0};
  uint32_t crc = reader.Number();
  kernel->code = reader.String();
  uint32_t magic = 0;
  if (kernel->code.size() >= 20) std::memcpy(&magic, kernel->code.data(), 4);
  if (magic != kSpirvMagic || kernel->code.size() % 4 != 0 || Crc32(kernel->code) != crc) {
    TVM_FFI_THROW(ValueError) << "Vulkan: the SPIR-V of kernel " << kernel->name << " is damaged";
  }
  return kernel;
}

// Kernels compute indices in 32 bits: refuses what is larger.
void CheckElements(const Kernel& kernel, const Memory& memory, uint64_t address, int64_t bytes) {
  int64_t elements = static_cast<int64_t>(memory.BytesFrom(address)) / bytes;
  if (elements > kMaxElements) {
    TVM_FFI_THROW(RuntimeError) << "Vulkan: kernel " << kernel.name << " got a tensor of "
                                << elements << " elements, more than 2^31";
  }
}

void Launch(Kernel& kernel, const TVMFFIAny* values, size_t count) {
  size_t num_arguments = kernel.arguments.size();
  if (count != num_arguments + kernel.launch.size()) {
    TVM_FFI_THROW(TypeError) << "Vulkan: kernel " << kernel.name << " takes "
                             << num_arguments + kernel.launch.size() << " values, got " << count;
  }
  Device& device = Devices::Get().Open(CurrentDevice());
  std::lock_guard<std::recursive_mutex> lock(device.mutex);
  std::vector<uint64_t> slots(num_arguments + 1, 0);
  for (size_t i = 0; i < num_arguments; ++i) {
    const Argument& argument = kernel.arguments[i];
    int64_t value = values[i].v_int64;
    if (argument.kind == Kind::kPointer) {
      slots[i] = reinterpret_cast<uint64_t>(values[i].v_ptr);
      if (device.memory->has_huge()) {
        CheckElements(kernel, *device.memory, slots[i], argument.element_bytes);
      }
    } else if (argument.kind == Kind::kFloat) {
      float narrow = static_cast<float>(values[i].v_float64);
      std::memcpy(&slots[i], &narrow, sizeof(narrow));
    } else {
      if (argument.kind == Kind::kIndex && value != static_cast<int32_t>(value)) {
        TVM_FFI_THROW(RuntimeError) << "Vulkan: kernel " << kernel.name << " got an extent of "
                                    << value << ", more than 32 bits";
      }
      std::memcpy(&slots[i], &value, sizeof(value));
    }
  }
  int64_t grid[3] = {1, 1, 1};
  for (size_t i = 0; i < kernel.launch.size(); ++i) {
    if (kernel.launch[i] >= 0) grid[kernel.launch[i]] = values[num_arguments + i].v_int64;
  }
  if (grid[0] <= 0 || grid[1] <= 0 || grid[2] <= 0) return;  // nothing to do
  slots[num_arguments] = static_cast<uint64_t>(grid[0]);
  const uint32_t* limits = device.info.properties.limits.maxComputeWorkGroupCount;
  if (kernel.folds_x && grid[0] > limits[0]) {
    grid[2] = (grid[0] + limits[0] - 1) / limits[0];
    grid[0] = (grid[0] + grid[2] - 1) / grid[2];
  }
  for (int axis = 0; axis < 3; ++axis) {
    if (grid[axis] > limits[axis]) {
      TVM_FFI_THROW(RuntimeError) << "Vulkan: kernel " << kernel.name << " wants " << grid[axis]
                                  << " workgroups along " << "xyz"[axis] << ", the device allows "
                                  << limits[axis];
    }
  }
  Device::Pipeline& pipeline = kernel.pipelines[CurrentDevice()];
  if (pipeline.pipeline == VK_NULL_HANDLE) {
    size_t push_bytes = kernel.in_buffer ? 8 : slots.size() * 8;
    pipeline =
        device.MakePipeline(kernel.name, kernel.code, static_cast<uint32_t>(push_bytes),
                            kernel.subgroups);
  }
  uint32_t extents[3] = {static_cast<uint32_t>(grid[0]), static_cast<uint32_t>(grid[1]),
                         static_cast<uint32_t>(grid[2])};
  device.stream->Dispatch(pipeline.pipeline, pipeline.layout, slots.data(), slots.size(),
                          kernel.in_buffer, extents);
}

class VulkanModule final : public ffi::ModuleObj {
 public:
  explicit VulkanModule(const ffi::Bytes& bytes) : bytes_(bytes) {
    Reader reader("Vulkan", bytes);
    reader.ExpectMagic(kMagic);
    uint32_t subgroup = reader.Number();
    for (uint32_t count = reader.Number(); count > 0; --count) {
      std::shared_ptr<Kernel> kernel = ParseKernel(reader, subgroup);
      kernels_[kernel->name] = kernel;
    }
    features_ = reader.Strings();
  }

  const char* kind() const final { return "vulkan"; }
  int GetPropertyMask() const final {
    return ffi::Module::kBinarySerializable | ffi::Module::kRunnable;
  }
  ffi::Bytes SaveToBytes() const final { return bytes_; }
  bool ImplementsFunction(const ffi::String& name) final {
    return name == kFeatures || kernels_.count(std::string(name)) > 0;
  }
  ffi::Optional<ffi::Function> GetFunction(const ffi::String& name) final {
    if (name == kFeatures) {
      ffi::Array<ffi::String> features;
      for (const std::string& feature : features_) features.push_back(feature);
      return ffi::Function::FromTyped([features] { return features; });
    }
    auto found = kernels_.find(std::string(name));
    if (found == kernels_.end()) return std::nullopt;
    std::shared_ptr<Kernel> kernel = found->second;
    return ffi::Function::FromPacked([kernel](ffi::PackedArgs args, ffi::Any*) {
      Launch(*kernel, reinterpret_cast<const TVMFFIAny*>(args.data()),
             static_cast<size_t>(args.size()));
    });
  }

 private:
  static constexpr const char* kFeatures = "llmc_features";

  ffi::Bytes bytes_;
  std::unordered_map<std::string, std::shared_ptr<Kernel>> kernels_;
  std::vector<std::string> features_;
};

}  // namespace

ffi::Module LoadModule(const ffi::Bytes& bytes) {
  return ffi::Module(ffi::make_object<VulkanModule>(bytes));
}

}  // namespace llmc::vulkan
