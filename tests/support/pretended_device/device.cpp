// A pretended accelerator for torch. Its memory is the host's and the CPU computes every operation,
// but under the rules of a device: no operation takes a tensor of the host beside one of the
// device, memory is limited, and waits of the host and copies are counted. The pinned source of an
// asynchronous copy must not change before the host has waited.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace {

constexpr auto kDevice = c10::DeviceType::PrivateUse1;
constexpr size_t kHeaderBytes = 64;
constexpr unsigned char kPoison = 0xEE;  // fresh memory is not zero

struct AsyncCopy {
  at::Storage source;
  uint64_t hash;
};

// Never freed: tensors may outlive static variables when the process ends.
auto& mutex = *new std::recursive_mutex();
auto& counts = *new std::map<std::string, long>();
auto& races = *new std::vector<std::string>();
auto& running_copies = *new std::vector<AsyncCopy>();
auto& pinned_blocks = *new std::set<const void*>();
bool is_counting = true;
bool is_checking = true;
bool is_capturing = false;
size_t limit_bytes = 0;  // 0: no limit
size_t used_bytes = 0;
size_t peak_bytes = 0;
auto& device_generator = *new at::Generator();

using Lock = std::lock_guard<std::recursive_mutex>;

// Sets a flag for a scope, also where an error ends the scope.
struct Scoped {
  bool& flag;
  bool before;
  Scoped(bool& flag, bool value) : flag(flag), before(flag) { flag = value; }
  ~Scoped() { flag = before; }
};

uint64_t hash_of(const at::Storage& storage) {
  auto bytes = static_cast<const unsigned char*>(storage.data());
  uint64_t hash = 1469598103934665603ull;  // FNV-1a
  for (size_t i = 0; i < storage.nbytes(); i++) hash = (hash ^ bytes[i]) * 1099511628211ull;
  return hash;
}

void count(const std::string& name) {
  Lock lock(mutex);
  if (is_counting) counts[name]++;
}

// The host waits for the device.
void wait_for_device(const std::string& reason) {
  Lock lock(mutex);
  if (!is_counting) return;
  TORCH_CHECK(!is_capturing, "operation not permitted when stream is capturing: ", reason);
  count("wait: " + reason);
  for (auto& copy : running_copies)
    if (hash_of(copy.source) != copy.hash)
      races.push_back("the pinned source of an asynchronous copy changed before a wait");
  running_copies.clear();
}

// --- memory ------------------------------------------------------------------------------------

struct DeviceAllocator final : public c10::Allocator {
  c10::DataPtr allocate(size_t n_bytes) override {
    Lock lock(mutex);
    bool fits = limit_bytes == 0 || used_bytes + n_bytes <= limit_bytes;
    TORCH_CHECK_WITH(OutOfMemoryError, fits, "pretended device out of memory: tried ", n_bytes,
                     " bytes with ", used_bytes, " of ", limit_bytes, " in use");
    used_bytes += n_bytes;
    peak_bytes = std::max(peak_bytes, used_bytes);
    auto block = static_cast<char*>(std::malloc(n_bytes + kHeaderBytes));
    *reinterpret_cast<size_t*>(block) = n_bytes;
    std::memset(block + kHeaderBytes, kPoison, n_bytes);
    return {block + kHeaderBytes, block, &release, c10::Device(kDevice, 0)};
  }
  static void release(void* block) {
    Lock lock(mutex);
    used_bytes -= *static_cast<size_t*>(block);
    std::free(block);
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t n_bytes) const final {
    std::memcpy(to, from, n_bytes);
  }
};
DeviceAllocator device_allocator;
REGISTER_ALLOCATOR(kDevice, &device_allocator);

struct PinnedAllocator final : public c10::Allocator {
  c10::DataPtr allocate(size_t n_bytes) override {
    void* block = nullptr;
    TORCH_CHECK(posix_memalign(&block, kHeaderBytes, n_bytes + kHeaderBytes) == 0, "no memory");
    Lock lock(mutex);
    pinned_blocks.insert(block);
    count("pinned allocation");
    return {block, block, &release, c10::Device(c10::DeviceType::CPU)};
  }
  static void release(void* block) {
    Lock lock(mutex);
    pinned_blocks.erase(block);
    std::free(block);
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t n_bytes) const final {
    std::memcpy(to, from, n_bytes);
  }
};
PinnedAllocator pinned_allocator;

void grow(const c10::Storage& storage, size_t n_bytes) {
  auto memory = device_allocator.allocate(n_bytes);
  if (storage.nbytes()) std::memcpy(memory.get(), storage.data(), std::min(n_bytes, storage.nbytes()));
  storage.unsafeGetStorageImpl()->set_data_ptr(std::move(memory));
  storage.unsafeGetStorageImpl()->set_nbytes(n_bytes);
}

// --- one device with one stream ----------------------------------------------------------------

struct DeviceGuard final : public c10::impl::DeviceGuardImplInterface {
  static c10::Stream only_stream() {
    return c10::Stream(c10::Stream::DEFAULT, c10::Device(kDevice, 0));
  }
  c10::DeviceType type() const override { return kDevice; }
  c10::Device exchangeDevice(c10::Device) const override { return c10::Device(kDevice, 0); }
  c10::Device getDevice() const override { return c10::Device(kDevice, 0); }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(device.index() <= 0, "there is one pretended device");
  }
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return only_stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return only_stream(); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex,
              const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  void synchronizeDevice(const c10::DeviceIndex) const override { wait_for_device("synchronize"); }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, DeviceGuard);

struct DeviceHooks final : public at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return device_generator;
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::detail::createCPUGenerator(1);
  }
  at::Device getDeviceFromPtr(void*) const override { return c10::Device(kDevice, 0); }
  bool isPinnedPtr(const void* pointer) const override {
    Lock lock(mutex);
    return pinned_blocks.count(pointer) > 0;
  }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t n_bytes) const override {
    grow(storage, n_bytes);
  }
};

// --- every operation, by the CPU ---------------------------------------------------------------

bool is_on_device(const at::Tensor& tensor) {
  return tensor.defined() && tensor.device().type() == kDevice;
}

// Scalars of the host may stand beside tensors of a device.
bool is_host_array(const at::Tensor& tensor) {
  return tensor.defined() && tensor.device().type() == c10::DeviceType::CPU && tensor.dim() > 0;
}

// Operations whose result, or its size, the host must know.
const std::set<std::string> kWaiting = {
    "aten::nonzero",     "aten::_local_scalar_dense", "aten::equal",
    "aten::is_nonzero",  "aten::_unique2",            "aten::unique_dim",
    "aten::bincount",    "aten::masked_select",       "aten::unique_consecutive"};
// Indices may be on the host, which costs a copy.
const std::set<std::string> kIndexing = {
    "aten::index.Tensor", "aten::index_put_", "aten::_index_put_impl_", "aten::index.Tensor_out"};

void check_devices(const std::string& name, const c10::FunctionSchema& schema,
                   c10::ArrayRef<c10::IValue> arguments) {
  bool has_device = false;
  std::string host_argument;
  auto look = [&](const at::Tensor& tensor, const std::string& argument) {
    has_device |= is_on_device(tensor);
    if (is_host_array(tensor)) host_argument = argument;
  };
  for (size_t i = 0; i < arguments.size(); i++) {
    const auto& value = arguments[i];
    const auto& argument = schema.arguments()[i].name();
    if (value.isTensor()) {
      look(value.toTensor(), argument);
    } else if (value.isList()) {
      for (const auto& element : value.toListRef())
        if (element.isTensor()) look(element.toTensor(), argument);
    }
  }
  bool is_mixed = has_device && !host_argument.empty();
  bool may_mix = kIndexing.count(name) > 0 || name == "aten::_to_copy";
  TORCH_CHECK(!is_checking || !is_mixed || may_mix,
              "Expected all tensors to be on the same device, but ", name,
              " got a tensor of the host as ", host_argument);
}

void count_waits(const std::string& name, c10::ArrayRef<c10::IValue> arguments) {
  if (kWaiting.count(name)) wait_for_device(name);
  // Without the size of the result the host must ask for it.
  if (name == "aten::repeat_interleave.Tensor" && arguments[1].isNone()) wait_for_device(name);
  if (!kIndexing.count(name)) return;
  for (const auto& element : arguments[1].toListRef()) {
    if (!element.isTensor() || !element.toTensor().defined()) continue;
    if (element.toTensor().scalar_type() == at::kBool) {
      wait_for_device(name + " with a mask");
    } else if (!is_on_device(element.toTensor())) {
      wait_for_device(name + " with indices of the host");
    }
  }
}

void run_on_cpu(const c10::OperatorHandle& operation, torch::jit::Stack* stack) {
  const auto& schema = operation.schema();
  const auto& overload = schema.overload_name();
  std::string name = schema.name() + (overload.empty() ? "" : "." + overload);
  auto arguments = torch::jit::last(*stack, schema.arguments().size());
  check_devices(name, schema, arguments);
  count("operation: " + name);
  count_waits(name, arguments);
  Scoped unchecked(is_checking, false);
  Scoped uncaptured(is_capturing, false);
  Scoped uncounted(is_counting, false);
  auto tags = operation.getTags();
  bool draws = std::find(tags.begin(), tags.end(), at::Tag::nondeterministic_seeded) != tags.end();
  if (!draws) {
    at::native::cpu_fallback(operation, stack);
    return;
  }
  // The device's own random numbers, drawn by the host's generator.
  auto host = at::detail::getDefaultCPUGenerator();
  auto host_state = host.get_state();
  host.set_state(device_generator.get_state());
  at::native::cpu_fallback(operation, stack);
  device_generator.set_state(host.get_state());
  host.set_state(host_state);
}

// The same memory as a tensor of the host.
at::Tensor host_alias(const at::Tensor& tensor) {
  if (!tensor.defined()) return tensor;
  auto memory = c10::DataPtr(const_cast<void*>(tensor.storage().data()),
                             c10::Device(c10::DeviceType::CPU));
  auto storage = c10::Storage(c10::Storage::use_byte_size_t{}, tensor.storage().nbytes(),
                              std::move(memory), nullptr, false);
  auto options = tensor.options().device(c10::kCPU).pinned_memory(false);
  return at::empty({0}, options)
      .set_(storage, tensor.storage_offset(), tensor.sizes(), tensor.strides());
}

void count_copy_to_device(const at::Tensor& source, bool non_blocking) {
  if (!non_blocking) {
    wait_for_device("copy to the device");
  } else if (!source.is_pinned()) {
    // CUDA stages pageable memory, and the host waits for that.
    wait_for_device("copy of pageable memory to the device");
  } else {
    count("asynchronous copy to the device");
    Lock lock(mutex);
    if (is_counting) running_copies.push_back({source.storage(), hash_of(source.storage())});
  }
}

at::Tensor copy_from(const at::Tensor& source, const at::Tensor& target, bool non_blocking) {
  bool from_device = is_on_device(source);
  bool to_device = is_on_device(target);
  if (!from_device && to_device) count_copy_to_device(source, non_blocking);
  bool is_asynchronous = non_blocking && target.is_pinned();
  if (from_device && !to_device && !is_asynchronous) wait_for_device("copy to the host");
  Scoped uncounted(is_counting, false);
  auto host_target = to_device ? host_alias(target) : target;
  host_target.copy_(from_device ? host_alias(source) : source);
  return target;
}

at::Tensor copy_from_and_resize(const at::Tensor& source, const at::Tensor& target) {
  if (target.sizes() != source.sizes()) target.resize_(source.sizes());
  return copy_from(source, target, false);
}

// --- what makes tensors, which no fallback can do ----------------------------------------------

at::Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype,
                 std::optional<c10::Layout>, std::optional<c10::Device>, std::optional<bool>,
                 std::optional<c10::MemoryFormat> format) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &device_allocator,
                                   c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor empty_like_sizes(at::IntArrayRef size, at::IntArrayRef stride, at::ScalarType dtype) {
  return at::detail::empty_strided_generic(size, stride, &device_allocator,
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           dtype);
}

at::Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                         std::optional<at::ScalarType> dtype, std::optional<c10::Layout>,
                         std::optional<c10::Device>, std::optional<bool>) {
  return empty_like_sizes(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                          c10::dtype_or_default(dtype));
}

at::Scalar local_scalar(const at::Tensor& tensor) {
  wait_for_device("item");
  return host_alias(tensor).item();
}

at::Tensor as_strided(const at::Tensor& tensor, c10::SymIntArrayRef size,
                      c10::SymIntArrayRef stride, std::optional<c10::SymInt> offset) {
  std::optional<int64_t> number;
  if (offset) number = offset->guard_int(__FILE__, __LINE__);
  return at::native::as_strided_tensorimpl(tensor, C10_AS_INTARRAYREF_SLOW(size),
                                           C10_AS_INTARRAYREF_SLOW(stride), number);
}

at::Tensor view(const at::Tensor& tensor, c10::SymIntArrayRef size) {
  return at::native::view(tensor, C10_AS_INTARRAYREF_SLOW(size));
}

at::Tensor reshape_alias(const at::Tensor& tensor, c10::SymIntArrayRef size,
                         c10::SymIntArrayRef stride) {
  return at::native::as_strided_tensorimpl(tensor, C10_AS_INTARRAYREF_SLOW(size),
                                           C10_AS_INTARRAYREF_SLOW(stride),
                                           tensor.storage_offset());
}

const at::Tensor& resize(const at::Tensor& tensor, c10::SymIntArrayRef size,
                         std::optional<c10::MemoryFormat>) {
  auto implementation = tensor.unsafeGetTensorImpl();
  implementation->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(size));
  size_t n_numbers = implementation->numel() + implementation->storage_offset();
  size_t n_bytes = n_numbers * tensor.element_size();
  if (n_bytes > tensor.storage().nbytes()) grow(tensor.storage(), n_bytes);
  return tensor;
}

at::Tensor& set_source(at::Tensor& tensor, const at::Tensor& source) {
  auto implementation = tensor.unsafeGetTensorImpl();
  implementation->set_storage_keep_dtype(source.storage());
  implementation->set_sizes_and_strides(source.sizes(), source.strides(), source.storage_offset());
  return tensor;
}

at::Tensor& set_storage(at::Tensor& tensor, at::Storage storage, c10::SymInt offset,
                        c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  auto implementation = tensor.unsafeGetTensorImpl();
  implementation->set_storage_keep_dtype(storage);
  implementation->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size),
                                        C10_AS_INTARRAYREF_SLOW(stride),
                                        offset.guard_int(__FILE__, __LINE__));
  return tensor;
}

// --- convolutions, for which torch asks every backend ------------------------------------------

at::Tensor to_device(const at::Tensor& host) {
  if (!host.defined()) return host;
  auto copied = empty_like_sizes(host.sizes(), host.strides(), host.scalar_type());
  Scoped uncounted(is_counting, false);
  host_alias(copied).copy_(host);
  return copied;
}

at::Tensor convolution(const at::Tensor& input, const at::Tensor& weight,
                       const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
                       at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
                       at::IntArrayRef output_padding, int64_t groups) {
  TORCH_CHECK(is_on_device(input) && is_on_device(weight),
              "Expected all tensors to be on the same device (convolution)");
  std::optional<at::Tensor> host_bias;
  if (bias && bias->defined()) host_bias = host_alias(*bias);
  return to_device(at::convolution(host_alias(input), host_alias(weight), host_bias, stride,
                                   padding, dilation, transposed, output_padding, groups));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& gradient, const at::Tensor& input, const at::Tensor& weight,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
    at::IntArrayRef output_padding, int64_t groups, std::array<bool, 3> mask) {
  std::vector<int64_t> bias_size{weight.size(0)};
  at::OptionalIntArrayRef bias_sizes;
  if (mask[2]) bias_sizes = at::IntArrayRef(bias_size);
  auto [by_input, by_weight, by_bias] = at::convolution_backward(
      host_alias(gradient), host_alias(input), host_alias(weight), bias_sizes, stride, padding,
      dilation, transposed, output_padding, groups, mask);
  return {to_device(by_input), to_device(by_weight), to_device(by_bias)};
}

// Its schema does not say that it writes the running statistics, so no fallback copies them back.
std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm(
    const at::Tensor& input, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& running_mean,
    const std::optional<at::Tensor>& running_var, bool is_training, double momentum, double eps) {
  auto on_host = [](const std::optional<at::Tensor>& tensor) {
    std::optional<at::Tensor> host;
    if (tensor && tensor->defined()) host = host_alias(*tensor);
    return host;
  };
  auto [output, mean, inverse_deviation] = at::native_batch_norm(
      host_alias(input), on_host(weight), on_host(bias), on_host(running_mean),
      on_host(running_var), is_training, momentum, eps);
  return {to_device(output), to_device(mean), to_device(inverse_deviation)};
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}
TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("_copy_from", &copy_from);
  library.impl("_copy_from_and_resize", &copy_from_and_resize);
  library.impl("_local_scalar_dense", &local_scalar);
  library.impl("as_strided", &as_strided);
  library.impl("view", &view);
  library.impl("_reshape_alias", &reshape_alias);
  library.impl("resize_", &resize);
  library.impl("unfold", &at::native::unfold);
  library.impl("set_.source_Tensor", &set_source);
  library.impl("set_.source_Storage_storage_offset", &set_storage);
  library.impl("native_batch_norm", &batch_norm);
  library.impl("convolution_overrideable", &convolution);
  library.impl("convolution_backward_overrideable", &convolution_backward);
}

void reset() {
  Lock lock(mutex);
  counts.clear();
  races.clear();
  running_copies.clear();
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  at::RegisterPrivateUse1HooksInterface(new DeviceHooks());
  device_generator = at::detail::createCPUGenerator(1);
  module.def("counts", [] { return counts; });
  module.def("races", [] { return races; });
  module.def("reset", &reset);
  module.def("wait", &wait_for_device);
  module.def("capture", [](bool value) { is_capturing = value; });
  module.def("limit", [](size_t n_bytes) { limit_bytes = n_bytes; });
  module.def("used", [] { return used_bytes; });
  module.def("peak", [] { return peak_bytes; });
  module.def("reset_peak", [] { peak_bytes = used_bytes; });
  module.def("get_state", [] { return device_generator.get_state(); });
  module.def("set_state", [](const at::Tensor& state) { device_generator.set_state(state); });
  module.def("seed", [](uint64_t seed) { device_generator.set_current_seed(seed); });
}
