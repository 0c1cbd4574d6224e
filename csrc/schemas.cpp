// Schemas of the native ops, for all devices: those of resnet_fast/dispatch/ops.py without `impl`. csrc/cpu and
// csrc/cuda register the kernels with TORCH_LIBRARY_IMPL(resnet_fast_native, CPU or CUDA, m).
#include <torch/library.h>

TORCH_LIBRARY(resnet_fast_native, m) {
  m.def(
      "bn_stats(Tensor x) -> (Tensor mean, Tensor m2)");
  m.def(
      "bn_finalize(Tensor mean, Tensor m2, int count, Tensor? weight, Tensor? bias, float eps) "
      "-> (Tensor scale, Tensor shift, Tensor rstd)");
  m.def(
      "bn_fold(Tensor x, Tensor?[] vectors, float[] eps) -> Tensor[]");
  m.def(
      "bn_bwd_finalize(Tensor sum_dy, Tensor sum_dy_xhat, Tensor scale, Tensor rstd, int count) "
      "-> (Tensor b, Tensor c)");
  m.def(
      "bn_act(Tensor z, Tensor scale, Tensor shift, Tensor? residual, Tensor? res_scale, "
      "Tensor? res_shift, bool relu, bool save_mask) -> (Tensor y, Tensor mask)");
  m.def(
      "add_relu(Tensor x, Tensor residual, bool save_mask) -> (Tensor y, Tensor mask)");
  m.def(
      "add_relu_bwd(Tensor dy, Tensor mask) -> Tensor");
  m.def(
      "bn_act_bwd_reduce(Tensor dy, Tensor? mask, Tensor z, Tensor mean, Tensor rstd, Tensor? "
      "residual, Tensor? res_mean, Tensor? res_rstd) -> (Tensor sum_dy, Tensor sum_dy_xhat, "
      "Tensor sum_dy_res_xhat)");
  m.def(
      "bn_act_bwd_apply(Tensor dy, Tensor? mask, Tensor? a, Tensor? z, Tensor? mean, Tensor? b, "
      "Tensor? c, Tensor? residual) -> Tensor");
  m.def(
      "bn_relu_max_pool(Tensor z, Tensor? scale, Tensor? shift, int[2] kernel, int[2] stride, int[2] "
      "padding, bool save_index) -> (Tensor y, Tensor index)");
  m.def(
      "max_pool_bwd(Tensor dy, Tensor index, Tensor x, Tensor? mean, Tensor? rstd, int[2] kernel, "
      "int[2] stride, int[2] padding) -> (Tensor dx, Tensor sum_dx, Tensor sum_dx_xhat)");
  m.def(
      "global_avg_pool(Tensor x) -> Tensor");
  m.def(
      "conv_fprop(Tensor x, Tensor w, Tensor? in_scale, Tensor? in_shift, bool stats, int[2] "
      "stride, int[2] padding, int[2] dilation, int groups, Tensor? bias=None, Tensor? "
      "residual=None, bool relu=False) -> (Tensor z, Tensor mean, Tensor m2)");
  m.def(
      "conv_bprop(Tensor dy, Tensor w, Tensor x, Tensor? dy_mask, Tensor? a, Tensor? z, Tensor? "
      "mean, Tensor? b, Tensor? c, Tensor? in_scale, Tensor? in_shift, Tensor? in_mean, Tensor? "
      "in_rstd, Tensor? in_act, Tensor? residual, Tensor? residual_mask, int[2] stride, int[2] "
      "padding, int[2] dilation, int groups, bool need_dx, bool need_dw) -> (Tensor dx, Tensor "
      "dw, Tensor sum_dx, Tensor sum_dx_xhat)");
  m.def(
      "conv_bn_act(Tensor x, Tensor w, Tensor? bias, Tensor? bn_weight, Tensor? bn_bias, "
      "Tensor? running_mean, Tensor? running_var, Tensor? residual, bool relu, float eps, "
      "int[2] stride, int[2] padding, int[2] dilation, int groups) -> Tensor");
  m.def(  // which implementation convolves, and why: for RESNET_FAST_TRACE
      "conv_route(Tensor x, Tensor w, int[2] stride, int[2] padding, int[2] dilation, int groups, str op) -> "
      "(str, str)");
  m.def(  // several chains in inference, only for dispatch/native_inference.py: infer_chains.h
      "infer_chains(Tensor x, Tensor?[] tensors, int[] program, float[] eps) -> Tensor");
}
