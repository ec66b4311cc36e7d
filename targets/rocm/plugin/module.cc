#include "module.h"

#include <tvm/ffi/cast.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/function.h>

#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>

#include "device.h"
#include "reader.h"

namespace llmc::rocm {
namespace {

namespace ffi = tvm::ffi;

constexpr char kMagic[] = "LLMCRO01";
constexpr char kElfMagic[] = "\x7f" "ELF";
constexpr int kNumAxes = 6;  // of the grid, then of a block

enum class Kind { kPointer, kInteger, kFloat };

// What a launch passes of a value, aligned to its own size.
struct Argument {
  Kind kind;
  size_t bytes;
};

// A code object of one architecture, loaded on a device when its first kernel is launched there.
struct CodeObject {
  std::string architecture;
  uint32_t group;
  std::string code;
  std::map<int, hipModule> loaded;  // by device
};

struct Kernel {
  std::string name;
  std::vector<Argument> arguments;
  std::vector<int> launch;  // the axis that each extent sets
  uint32_t group;
  std::map<int, hipFunction> functions;  // by device
};

Argument ParseArgument(const std::string& text) {
  if (text == "pointer") return {Kind::kPointer, 8};
  size_t digits = text.find_first_of("0123456789");
  if (digits == std::string::npos) TVM_FFI_THROW(ValueError) << "HIP: an argument of type " << text;
  size_t bytes = static_cast<size_t>(std::stoi(text.substr(digits))) / 8;
  return {text.rfind("float", 0) == 0 ? Kind::kFloat : Kind::kInteger, bytes};
}

int ParseAxis(const std::string& tag) {
  int axis = tag.back() - 'x';
  return tag.rfind("blockIdx.", 0) == 0 ? axis : 3 + axis;
}

// The bytes that a kernel reads its arguments from.
std::vector<char> Pack(const Kernel& kernel, const TVMFFIAny* values) {
  std::vector<char> packed;
  for (size_t i = 0; i < kernel.arguments.size(); ++i) {
    const Argument& argument = kernel.arguments[i];
    size_t at = (packed.size() + argument.bytes - 1) / argument.bytes * argument.bytes;
    packed.resize(at + argument.bytes);
    float narrow = static_cast<float>(values[i].v_float64);
    const void* source = &values[i].v_int64;  // little-endian: a smaller one lies at the front
    if (argument.kind == Kind::kFloat && argument.bytes == sizeof(narrow)) source = &narrow;
    std::memcpy(packed.data() + at, source, argument.bytes);
  }
  return packed;
}

class RocmModule final : public ffi::ModuleObj {
 public:
  explicit RocmModule(const ffi::Bytes& bytes) : bytes_(bytes) {
    Reader reader("HIP", bytes_);
    reader.ExpectMagic(kMagic);
    for (uint32_t count = reader.Number(); count > 0; --count) {
      Kernel kernel;
      kernel.name = reader.String();
      for (const std::string& text : reader.Strings()) {
        kernel.arguments.push_back(ParseArgument(text));
      }
      for (const std::string& tag : reader.Strings()) kernel.launch.push_back(ParseAxis(tag));
      kernel.group = reader.Number();
      kernels_[kernel.name] = std::move(kernel);
    }
    for (uint32_t count = reader.Number(); count > 0; --count) {
      CodeObject object;
      object.architecture = reader.String();
      object.group = reader.Number();
      uint32_t crc = reader.Number();
      object.code = reader.String();
      if (object.code.compare(0, 4, kElfMagic) != 0 || Crc32(object.code) != crc) {
        TVM_FFI_THROW(ValueError) << "HIP: the code for " << object.architecture << " is damaged";
      }
      objects_.push_back(std::move(object));
    }
  }

  const char* kind() const final { return "llmc_rocm"; }
  int GetPropertyMask() const final {
    return ffi::Module::kBinarySerializable | ffi::Module::kRunnable;
  }
  ffi::Bytes SaveToBytes() const final { return bytes_; }
  bool ImplementsFunction(const ffi::String& name) final {
    return kernels_.count(std::string(name)) > 0;
  }
  ffi::Optional<ffi::Function> GetFunction(const ffi::String& name) final {
    auto found = kernels_.find(std::string(name));
    if (found == kernels_.end()) return std::nullopt;
    Kernel* kernel = &found->second;
    auto self = ffi::GetObjectPtr<ffi::Object>(this);  // what `kernel` is part of
    return ffi::Function::FromPacked([this, self, kernel](ffi::PackedArgs args, ffi::Any*) {
      Launch(*kernel, reinterpret_cast<const TVMFFIAny*>(args.data()),
             static_cast<size_t>(args.size()));
    });
  }

 private:
  void Launch(Kernel& kernel, const TVMFFIAny* values, size_t count) {
    size_t num_arguments = kernel.arguments.size();
    if (count != num_arguments + kernel.launch.size()) {
      TVM_FFI_THROW(TypeError) << "HIP: kernel " << kernel.name << " takes "
                               << num_arguments + kernel.launch.size() << " values, got " << count;
    }
    int64_t extents[kNumAxes] = {1, 1, 1, 1, 1, 1};
    for (size_t i = 0; i < kernel.launch.size(); ++i) {
      extents[kernel.launch[i]] = values[num_arguments + i].v_int64;
    }
    unsigned grid[kNumAxes];
    for (int axis = 0; axis < kNumAxes; ++axis) {
      if (extents[axis] <= 0) return;  // nothing to do
      // HIP counts the threads of an axis in 32 bits.
      int64_t threads = extents[axis] * (axis < 3 ? extents[axis + 3] : 1);
      if (threads > UINT32_MAX) {
        TVM_FFI_THROW(RuntimeError) << "HIP: kernel " << kernel.name << " wants " << extents[axis]
                                    << " blocks along " << "xyz"[axis % 3];
      }
      grid[axis] = static_cast<unsigned>(extents[axis]);
    }
    int device = CurrentDevice();
    Use(device);
    std::vector<char> packed = Pack(kernel, values);
    size_t bytes = packed.size();
    // HIP's markers: 1 a buffer's address follows, 2 the address of its size, 3 the end.
    void* buffer[] = {reinterpret_cast<void*>(1), packed.data(), reinterpret_cast<void*>(2), &bytes,
                      reinterpret_cast<void*>(3)};
    Check(hipModuleLaunchKernel(Find(kernel, device), grid[0], grid[1], grid[2], grid[3], grid[4],
                                grid[5], 0, CurrentStream(device), nullptr, buffer),
          "the launch of kernel " + kernel.name);
  }

  hipFunction Find(Kernel& kernel, int device) {
    std::lock_guard<std::mutex> lock(mutex_);
    hipFunction& function = kernel.functions[device];
    if (function == nullptr) {
      Check(hipModuleGetFunction(&function, Loaded(kernel, device), kernel.name.c_str()),
            "hipModuleGetFunction of kernel " + kernel.name);
    }
    return function;
  }

  // The module that holds the kernel; it stays until the process ends, as kernels may run.
  hipModule Loaded(const Kernel& kernel, int device) {
    const std::string& architecture = Describe(device).architecture;
    std::string others;
    for (CodeObject& object : objects_) {
      if (object.group != kernel.group) continue;
      others += (others.empty() ? "" : ", ") + object.architecture;
      if (object.architecture != architecture) continue;
      hipModule& loaded = object.loaded[device];
      if (loaded == nullptr) {
        Check(hipModuleLoadData(&loaded, object.code.data()),
              "hipModuleLoadData of the code for " + architecture);
      }
      return loaded;
    }
    TVM_FFI_THROW(RuntimeError) << "HIP: no code for " << architecture << ": the artifact has it for "
                                << others;
  }

  std::mutex mutex_;
  ffi::Bytes bytes_;
  std::unordered_map<std::string, Kernel> kernels_;
  std::vector<CodeObject> objects_;
};

}  // namespace

ffi::Module LoadModule(const ffi::Bytes& bytes) {
  return ffi::Module(ffi::make_object<RocmModule>(bytes));
}

}  // namespace llmc::rocm
