// The function table: one entry per kernel. kernels.cpp fills one table per instruction set.
#pragma once
#include <cstddef>
#include <cstdint>

namespace handtuned {

struct NormForward;
struct NormBackward;
struct AttentionForward;
struct AttentionBackward;
struct LinearPack;
struct LinearForward;
struct LinearBackward;
struct LinearInt8Pack;
struct LinearInt8;
struct CrossEntropyForward;
struct CrossEntropyBackward;
struct Rotary;
struct AppendKv;
struct RnnPack;
struct RnnForward;
struct RnnBackward;

struct Kernels {
  const char* isa;
  int vector_bytes;
  void (*norm_forward)(const NormForward&);
  void (*norm_backward)(const NormBackward&);
  void (*attention_forward)(const AttentionForward&);
  void (*attention_backward)(const AttentionBackward&);
  void (*linear_pack)(const LinearPack&);
  void (*linear_forward)(const LinearForward&);
  void (*linear_backward)(const LinearBackward&);
  void (*linear_int8_pack)(const LinearInt8Pack&);
  void (*linear_int8)(const LinearInt8&);
  void (*cross_entropy_forward)(const CrossEntropyForward&);
  void (*cross_entropy_backward)(const CrossEntropyBackward&);
  void (*rotary)(const Rotary&);
  void (*append_kv)(const AppendKv&);
  void (*rnn_pack)(const RnnPack&);
  void (*rnn_forward)(const RnnForward&);
  void (*rnn_backward)(const RnnBackward&);
  // Machine limits, measured with this ISA's own loads, stores and multiply-adds (cpu/limits.h).
  void (*copy)(void* dst, const void* src, size_t bytes);  // non-temporal stores
  double (*multiply_add)(int64_t iterations);              // of float; returns the flops it did
  double (*multiply_add_pairs)(int64_t iterations);        // of bf16; nullptr where bf16 is converted to float first
};

#ifdef HANDTUNED_ISA
namespace HANDTUNED_ISA {

void norm_forward(const NormForward&);
void norm_backward(const NormBackward&);
void attention_forward(const AttentionForward&);
void attention_backward(const AttentionBackward&);
void linear_pack(const LinearPack&);
void linear_forward(const LinearForward&);
void linear_backward(const LinearBackward&);
void linear_int8_pack(const LinearInt8Pack&);
void linear_int8(const LinearInt8&);
void cross_entropy_forward(const CrossEntropyForward&);
void cross_entropy_backward(const CrossEntropyBackward&);
void rotary(const Rotary&);
void append_kv(const AppendKv&);
void rnn_pack(const RnnPack&);
void rnn_forward(const RnnForward&);
void rnn_backward(const RnnBackward&);

}  // namespace HANDTUNED_ISA
#endif

}  // namespace handtuned
