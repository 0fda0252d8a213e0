// CPU kernels of glam::pack_weight and unpack_weight: a task is a strip of columns.

#include "ops/packed_weight.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/scratch.h"
#include "ops/large_memory.h"

namespace glam::cpu {
namespace {

// values[K][kStripColumns] = columns of one strip of a matrix [K, N].
template <class Scalar>
void load_strip(const Tensor& matrix, int64_t column, float* values) {
  const int64_t K = matrix.size(0), by_k = matrix.stride(0), by_n = matrix.stride(1);
  const Scalar* const data = matrix.const_data_ptr<Scalar>() + column * by_n;
  if (by_n == 1) {
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t n = 0; n < kStripColumns; ++n) {
        values[k * kStripColumns + n] = static_cast<float>(data[k * by_k + n]);
      }
    }
  } else {
    for (int64_t n = 0; n < kStripColumns; ++n) {
      for (int64_t k = 0; k < K; ++k) {
        values[k * kStripColumns + n] = static_cast<float>(data[k * by_k + n * by_n]);
      }
    }
  }
}

void round_strip(const float* values, int64_t K, at::BFloat16* strip) {
  for (int64_t k = 0; k < K; ++k) {
    for (int64_t n = 0; n < kStripColumns; ++n) {
      strip[packed::bf16_index(k, n)] = static_cast<at::BFloat16>(values[k * kStripColumns + n]);
    }
  }
}

void quantise_strip(const float* values, int64_t K, int8_t* strip) {
  constexpr float kLargest = 127;
  float largest[kStripColumns] = {}, inverse[kStripColumns];
  for (int64_t k = 0; k < K; ++k) {
    for (int64_t n = 0; n < kStripColumns; ++n) {
      const float size = std::abs(values[k * kStripColumns + n]);
      // A NaN is kept: no comparison is true of it.
      largest[n] = size <= largest[n] ? largest[n] : std::isnan(largest[n]) ? largest[n] : size;
    }
  }
  float* const scales = reinterpret_cast<float*>(strip);
  for (int64_t n = 0; n < kStripColumns; ++n) {
    const float scale = largest[n] / kLargest;
    const bool finite = std::isfinite(largest[n]);
    scales[n] = finite ? scale : std::numeric_limits<float>::quiet_NaN();
    inverse[n] = finite && scale > 0 ? 1 / scale : 0;
  }
  for (int64_t k = 0; k < K; ++k) {
    for (int64_t n = 0; n < kStripColumns; ++n) {
      const float value = inverse[n] == 0 ? 0 : std::nearbyint(values[k * kStripColumns + n] * inverse[n]);
      strip[packed::int8_index(k, n)] = static_cast<int8_t>(std::clamp(value, -kLargest, kLargest));
    }
  }
}

// f(matrix index, strip index) for every strip of a packed weight.
template <class F>
void for_each_strip(const Tensor& packed, F&& f) {
  const int64_t strips = packed.size(-3), all = packed.dim() == 4 ? packed.size(0) * strips : strips;
  at::parallel_for(0, all, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i / strips, i % strips);
  });
}

Tensor allocate(const packed::Shape& shape) {
  return empty_large(C10_AS_INTARRAYREF_SLOW(c10::SymIntArrayRef(shape.sizes)), at::TensorOptions(shape.dtype));
}

Tensor pack_weight(const Tensor& weight, at::ScalarType dtype) {
  const Tensor packed = allocate(packed::packed_shape(weight, dtype));
  const Tensor matrices = weight.dim() == 3 ? weight : weight.unsqueeze(0);
  const int64_t K = weight.size(-2), strip_elements = packed.size(-2) * packed.size(-1);
  if (packed.numel() == 0) return packed;
  for_each_strip(packed, [&](int64_t matrix, int64_t strip) {
    static thread_local Scratch scratch;
    float* const values = scratch.get<float>(K * kStripColumns);
    const int64_t first = (matrix * packed.size(-3) + strip) * strip_elements;
    const Tensor from = matrices.select(0, matrix);
    if (weight.scalar_type() == at::kFloat) {
      load_strip<float>(from, strip * kStripColumns, values);
    } else {
      load_strip<at::BFloat16>(from, strip * kStripColumns, values);
    }
    if (dtype == at::kChar) {
      quantise_strip(values, K, packed.mutable_data_ptr<int8_t>() + first);
    } else {
      round_strip(values, K, packed.mutable_data_ptr<at::BFloat16>() + first);
    }
  });
  return packed;
}

Tensor unpack_weight(const Tensor& packed) {
  const Tensor weight = allocate(packed::unpacked_shape(packed));
  const int64_t K = weight.size(-2), N = weight.size(-1), strip_elements = packed.size(-2) * packed.size(-1);
  if (weight.numel() == 0) return weight;
  for_each_strip(packed, [&](int64_t matrix, int64_t strip) {
    const int64_t from = (matrix * packed.size(-3) + strip) * strip_elements;
    const int64_t to = matrix * K * N + strip * kStripColumns;
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t n = 0; n < kStripColumns; ++n) {
        if (packed.scalar_type() == at::kChar) {
          const auto* const data = packed.const_data_ptr<int8_t>() + from;
          weight.mutable_data_ptr<float>()[to + k * N + n] =
              reinterpret_cast<const float*>(data)[n] * data[packed::int8_index(k, n)];
        } else {
          weight.mutable_data_ptr<at::BFloat16>()[to + k * N + n] =
              packed.const_data_ptr<at::BFloat16>()[from + packed::bf16_index(k, n)];
        }
      }
    }
  });
  return weight;
}

}  // namespace

TORCH_LIBRARY_IMPL(glam, CPU, m) {
  m.impl("pack_weight", pack_weight);
  m.impl("unpack_weight", unpack_weight);
}

}  // namespace glam::cpu
