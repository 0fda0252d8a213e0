#include "cpu/kernels/embedding.h"

#include "cpu/kernels/vector.h"

namespace glam::cpu::GLAM_ISA {
namespace {

constexpr int64_t kColumns = 256;

template <class T>
void sum_block(const RowSums& sums, int64_t begin, int64_t count) {
  T total[kColumns], values[kColumns];
  for (int64_t s = 0; s < sums.num_sums; ++s) {
    for (int64_t d = 0; d < count; ++d) total[d] = T(0);
    for (int64_t i = sums.starts[s]; i < sums.starts[s + 1]; ++i) {
      load_values(advance(sums.rows, sums.type, sums.order[i] * sums.D + begin), sums.type, count, values);
      for (int64_t d = 0; d < count; ++d) total[d] += values[d];
    }
    void* const out = advance(sums.out, sums.type, sums.ids[s] * sums.D + begin);
    load_values(out, sums.type, count, values);
    for (int64_t d = 0; d < count; ++d) total[d] += values[d];
    store_values(total, count, out, sums.type);
  }
}

void add_rows(const RowSums& sums, int64_t begin, int64_t end) {
  for (int64_t d = begin; d < end; d += kColumns) {
    const int64_t count = end - d < kColumns ? end - d : kColumns;
    if (sums.type == Type::f64) {
      sum_block<double>(sums, d, count);
    } else {
      sum_block<float>(sums, d, count);
    }
  }
}

}  // namespace

extern const EmbeddingTable embedding_table = {&add_rows};

}  // namespace glam::cpu::GLAM_ISA
