// T5's buckets of the distance query position - key position >= 0, for one direction, 32 buckets and distances to 128:
// one bucket per distance below 16, then min(31, 16 + floor(16 ln(distance / 16) / ln 8)), here as the smallest distance
// of each bucket so that no rounding decides. Source: Raffel et al. (arXiv 1910.10683); praxis attentions.py RelativeBias.
#pragma once

#include <array>
#include <cstdint>

namespace glam {

inline constexpr int64_t kNumBuckets = 32;
inline constexpr std::array<int64_t, 16> kFirstDistances = {16, 19, 21, 24, 27, 31, 35, 40,
                                                            46, 52, 59, 67, 77, 87, 99, 113};

constexpr int64_t bucket_of_distance(int64_t distance) {
  if (distance < 16) return distance;
  int64_t bucket = kNumBuckets - 1;
  while (distance < kFirstDistances[bucket - 16]) --bucket;
  return bucket;
}

}  // namespace glam
