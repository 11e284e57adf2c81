// The launchers that fill the function table (device.cu), one file a family.
#pragma once
#include "kernels.h"

namespace handtuned::cuda {

int norm_forward(const NormForward&, int device, void* stream);
int norm_backward(const NormBackward&, int device, void* stream);
int attention_forward(const AttentionForward&, int device, void* stream);
int attention_backward(const AttentionBackward&, int device, void* stream);
int rnn_pack(const RnnPack&, int device, void* stream);
int rnn_forward(const RnnForward&, int device, void* stream);
int rnn_backward(const RnnBackward&, int device, void* stream);

}  // namespace handtuned::cuda
