// A device that is none: memory of the host under torch's key for devices that others add.
//
// Kernels are those of the CPU, by torch's own fallback. What a GPU refuses is refused here as well:
// tensors of two devices in one operation, a generator of another device. Numbers are drawn by the
// generator of this device. Written against the headers of torch 2.11 and 2.13.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/native/transformers/sdp_utils_cpp.h>
#include <ATen/ops/_reshape_alias_cpu_dispatch.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/unfold_cpu_dispatch.h>
#include <ATen/ops/view_cpu_dispatch.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>

#include <array>
#include <cstdlib>
#include <cstring>

namespace {

constexpr auto KIND = c10::DeviceType::PrivateUse1;
const c10::Device HERE(KIND, 0);
// As the allocator of CUDA aligns.
constexpr size_t ALIGNMENT = 512;

struct Memory final : at::Allocator {
  at::DataPtr allocate(size_t bytes) override {
    void* data = nullptr;
    if (bytes && posix_memalign(&data, ALIGNMENT, bytes)) throw std::bad_alloc();
    return {data, data, &std::free, HERE};
  }
  at::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};
Memory memory;
REGISTER_ALLOCATOR(KIND, &memory);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return KIND; }
  c10::Device exchangeDevice(c10::Device) const override { return HERE; }
  c10::Device getDevice() const override { return HERE; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override {
    return c10::Stream(c10::Stream::DEFAULT, HERE);
  }
  c10::Stream getDefaultStream(c10::Device device) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Generator : at::CPUGeneratorImpl {
  Generator() : at::CPUGeneratorImpl(c10::default_rng_seed_val) {
    device_ = HERE;
    key_set_ = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  }
};

at::Generator& default_generator() {
  static at::Generator generator = at::make_generator<Generator>();
  return generator;
}

struct Hooks : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isPinnedPtr(const void*) const override { return false; }
  at::Allocator* getPinnedMemoryAllocator() const override { return at::getCPUAllocator(); }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::Device getDeviceFromPtr(void*) const override { return HERE; }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::make_generator<Generator>();
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return default_generator();
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto* held = storage.unsafeGetStorageImpl();
    auto made = memory.allocate(bytes);
    if (auto kept = std::min(bytes, held->nbytes())) {
      std::memcpy(made.mutable_get(), held->data(), kept);
    }
    held->set_data_ptr(std::move(made));
    held->set_nbytes(bytes);
  }
};

// The same memory as a tensor of the CPU's.
at::Tensor on_host(const at::Tensor& tensor) {
  const auto options = tensor.options().device(at::kCPU);
  if (tensor.device().type() != KIND) return tensor;
  if (!tensor.storage().data()) return at::empty_strided(tensor.sizes(), tensor.strides(), options);
  const auto storage = tensor.storage();
  const auto bytes = at::from_blob(
      const_cast<void*>(storage.data()), {static_cast<int64_t>(storage.nbytes())},
      [storage](void*) {}, at::TensorOptions().dtype(at::kByte));
  auto result = at::empty({0}, options);
  at::cpu::set_(result, bytes.storage(), tensor.storage_offset(), tensor.sizes(), tensor.strides());
  return result;
}

using Sizes = c10::IntArrayRef;
using SymSizes = at::SymIntArrayRef;
const c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);

at::Tensor empty(
    Sizes sizes, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
    std::optional<c10::Device>, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  return at::detail::empty_generic(sizes, &memory, KEYS, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    Sizes sizes, Sizes strides, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
    std::optional<c10::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(
      sizes, strides, &memory, KEYS, c10::dtype_or_default(dtype));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  on_host(to).copy_(on_host(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  if (to.numel() == 0) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar local_scalar(const at::Tensor& tensor) { return on_host(tensor).item(); }

const at::Tensor& resize_(
    const at::Tensor& tensor, SymSizes sizes, std::optional<at::MemoryFormat>) {
  auto* held = tensor.unsafeGetTensorImpl();
  held->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(sizes));
  const size_t bytes = (held->storage_offset() + held->numel()) * held->itemsize();
  if (bytes > held->unsafe_storage().nbytes()) {
    Hooks().resizePrivateUse1Bytes(held->unsafe_storage(), bytes);
  }
  return tensor;
}

at::Tensor& set_to_part(
    at::Tensor& tensor, at::Storage storage, at::SymInt offset, SymSizes sizes, SymSizes strides) {
  return at::cpu::set_(
      tensor, storage, offset.expect_int(), C10_AS_INTARRAYREF_SLOW(sizes),
      C10_AS_INTARRAYREF_SLOW(strides));
}

at::Tensor& set_to_tensor(at::Tensor& tensor, const at::Tensor& other) {
  return at::cpu::set_(
      tensor, other.storage(), other.storage_offset(), other.sizes(), other.strides());
}

at::Tensor& set_to_storage(at::Tensor& tensor, at::Storage storage) {
  const auto count = static_cast<int64_t>(storage.nbytes() / tensor.dtype().itemsize());
  return at::cpu::set_(tensor, storage, 0, {count}, {1});
}

at::Tensor& set_to_nothing(at::Tensor& tensor) {
  c10::Storage none(c10::Storage::use_byte_size_t(), 0, memory.allocate(0), &memory, true);
  return at::cpu::set_(tensor, none, 0, {0}, {1});
}

at::Tensor as_strided(
    const at::Tensor& tensor, SymSizes sizes, SymSizes strides, std::optional<at::SymInt> offset) {
  const auto start = offset ? std::optional<int64_t>(offset->expect_int()) : std::nullopt;
  return at::cpu::as_strided(
      tensor, C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides), start);
}

at::Tensor view(const at::Tensor& tensor, SymSizes sizes) {
  return at::cpu::view(tensor, C10_AS_INTARRAYREF_SLOW(sizes));
}

at::Tensor reshape_alias(const at::Tensor& tensor, SymSizes sizes, SymSizes strides) {
  return at::cpu::_reshape_alias(
      tensor, C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides));
}

at::Tensor unfold(const at::Tensor& tensor, int64_t dim, int64_t size, int64_t step) {
  return at::cpu::unfold(tensor, dim, size, step);
}

int64_t attention_by_plain_products(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
    double, bool, std::optional<double>, bool) {
  return static_cast<int64_t>(sdp::SDPBackend::math);
}

// A GPU takes indices from the host.
constexpr std::array<const char*, 4> MAY_MIX = {
    "aten::index.Tensor", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index."};

void check_devices(const std::string& name, c10::ArrayRef<c10::IValue> arguments) {
  bool here = false, elsewhere = false;
  const auto look = [&](const at::Tensor& tensor) {
    if (!tensor.defined()) return;
    if (tensor.device().type() == KIND) {
      here = true;
    } else if (tensor.dim() > 0) {
      elsewhere = true;
    }
  };
  for (const auto& value : arguments) {
    if (value.isTensor()) {
      look(value.toTensor());
    } else if (value.isTensorList()) {
      for (const at::Tensor& each : value.toTensorVector()) look(each);
    }
  }
  for (const auto* start : MAY_MIX) {
    if (name.rfind(start, 0) == 0) return;
  }
  TORCH_CHECK(
      !here || !elsewhere, "Expected all tensors to be on the same device, and ", name,
      " was given tensors of pretend:0 and of the CPU");
}

void by_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& given = op.schema().arguments();
  check_devices(toString(op.operator_name()), torch::jit::last(*stack, given.size()));
  const auto first = stack->size() - given.size();
  for (size_t at = 0; at < given.size(); ++at) {
    if (given[at].name() != "generator") continue;
    // A kernel of the CPU draws from a generator of the CPU: one that stands where ours does.
    auto& argument = (*stack)[first + at];
    auto own = argument.isNone() ? default_generator() : argument.toGenerator();
    TORCH_CHECK(own.device() == HERE, "a generator of ", own.device(), " draws nothing here");
    auto lent = at::make_generator<at::CPUGeneratorImpl>(c10::default_rng_seed_val);
    lent.set_state(own.get_state());
    argument = lent;
    at::native::cpu_fallback(op, stack);
    own.set_state(lent.get_state());
    return;
  }
  at::native::cpu_fallback(op, stack);
}

}  // namespace

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &attention_by_plain_products);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&by_the_cpu>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("resize_", resize_);
  m.impl("set_.source_Storage_storage_offset", set_to_part);
  m.impl("set_.source_Tensor", set_to_tensor);
  m.impl("set_.source_Storage", set_to_storage);
  m.impl("set_", set_to_nothing);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("unfold", unfold);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("register_hooks", [] { at::RegisterPrivateUse1HooksInterface(new Hooks()); });
  m.def("default_generator", [] { return default_generator(); });
}
