// The bf16 convolutions for Hopper.
#include "conv_sm90.inl"

namespace resnet_fast::cuda::sm90 {

template cudaError_t run<Dtype::kBFloat16>(const ConvForward&, int, cudaStream_t);

}  // namespace resnet_fast::cuda::sm90
