// Checks of an op's tensors. Each error names the op, the argument, what it is and what it should
// be: "bn_act: `residual` has shape [2, 8, 4, 4], expected [2, 8, 8, 8], the shape of `x`".
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <utility>

namespace resnet_fast {

// A tensor argument, with the names for an error message.
struct Arg {
  const char* op;    // "bn_act"
  const char* name;  // "residual"
  const at::Tensor& tensor;
};

// The dtype's name in Python, "float32"; c10's name is "Float".
inline const char* dtype_name(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return "float32";
    case at::kDouble:
      return "float64";
    case at::kBFloat16:
      return "bfloat16";
    case at::kHalf:
      return "float16";
    default:
      return c10::toString(dtype);
  }
}

inline void check_defined(const Arg& a) {
  TORCH_CHECK(a.tensor.defined(), a.op, ": `", a.name, "` is undefined, expected a tensor");
}

inline void check_dtype(const Arg& a, std::initializer_list<at::ScalarType> expected) {
  for (const at::ScalarType dtype : expected) {
    if (a.tensor.scalar_type() == dtype) return;
  }
  std::ostringstream words;
  for (const at::ScalarType dtype : expected) words << (words.tellp() > 0 ? " or " : "") << dtype_name(dtype);
  TORCH_CHECK_TYPE(false, a.op, ": `", a.name, "` has dtype ",
                   dtype_name(a.tensor.scalar_type()), ", expected ", words.str());
}

inline void check_floating(const Arg& a) {
  check_dtype(a, {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf});
}

// Statistics and affine vectors: float32, or float64 with float64 data.
inline void check_accumulate_dtype(const Arg& a, at::ScalarType data) {
  check_dtype(a, {data == at::kDouble ? at::kDouble : at::kFloat});
}

inline void check_dim(const Arg& a, int64_t dim) {
  TORCH_CHECK(a.tensor.dim() == dim, a.op, ": `", a.name, "` has ", a.tensor.dim(),
              " dimensions and shape ", a.tensor.sizes(), ", expected ", dim, " dimensions");
}

inline void check_4d(const Arg& a) {
  TORCH_CHECK(a.tensor.dim() == 4, a.op, ": `", a.name, "` has shape ", a.tensor.sizes(),
              ", expected 4 dimensions [N, C, H, W]");
}

inline void check_shape(const Arg& a, at::IntArrayRef expected) {
  TORCH_CHECK(a.tensor.sizes() == expected, a.op, ": `", a.name, "` has shape ",
              a.tensor.sizes(), ", expected ", expected);
}

// One value per channel: shape [channels], contiguous.
inline void check_channels(const Arg& a, int64_t channels) {
  TORCH_CHECK(a.tensor.dim() == 1 && a.tensor.size(0) == channels, a.op, ": `", a.name,
              "` has shape ", a.tensor.sizes(), ", expected [", channels,
              "], one value per channel");
  TORCH_CHECK(a.tensor.is_contiguous(), a.op, ": `", a.name,
              "` is not contiguous, expected a contiguous vector");
}

inline void check_same_shape(const Arg& a, const Arg& like) {
  TORCH_CHECK(a.tensor.sizes() == like.tensor.sizes(), a.op, ": `", a.name, "` has shape ",
              a.tensor.sizes(), ", expected ", like.tensor.sizes(), ", the shape of `", like.name, "`");
}

inline void check_same_dtype(const Arg& a, const Arg& like) {
  TORCH_CHECK_TYPE(a.tensor.scalar_type() == like.tensor.scalar_type(), a.op, ": `", a.name,
                   "` has dtype ", dtype_name(a.tensor.scalar_type()), ", expected ",
                   dtype_name(like.tensor.scalar_type()), ", the dtype of `", like.name, "`");
}

inline void check_same_device(const Arg& a, const Arg& like) {
  TORCH_CHECK(a.tensor.device() == like.tensor.device(), a.op, ": `", a.name, "` is on ",
              a.tensor.device(), ", expected ", like.tensor.device(), ", the device of `", like.name,
              "`");
}

// Dense in NCHW or channels_last order, the two memory formats that the kernels read.
inline void check_dense_4d(const Arg& a) {
  check_4d(a);
  TORCH_CHECK(a.tensor.is_contiguous() || a.tensor.is_contiguous(at::MemoryFormat::ChannelsLast),
              a.op, ": `", a.name, "` has strides ", a.tensor.strides(),
              ", expected contiguous or channels_last memory");
}

// A second activation: same shape, dtype and device as the first.
inline void check_like(const Arg& a, const Arg& like) {
  check_same_device(a, like);
  check_same_dtype(a, like);
  check_same_shape(a, like);
}

// Operands that are only valid together: all of them or none.
inline void check_together(
    const char* op, std::initializer_list<std::pair<const char*, const std::optional<at::Tensor>*>> operands) {
  const auto& [first, there] = *operands.begin();
  for (const auto& [name, operand] : operands) {
    TORCH_CHECK(operand->has_value() == there->has_value(), op, ": `", operand->has_value() ? first : name,
                "` is missing; `", operand->has_value() ? name : first, "` requires it");
  }
}

}  // namespace resnet_fast
