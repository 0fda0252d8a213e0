// Sizes of weights packed for inference; the layout is that of kernels/stored.h.
#pragma once

#include <cstdint>

namespace glam {

inline constexpr int64_t kStripColumns = 32;
inline constexpr int64_t kScaleRows = 4;  // of kStripColumns bytes: that many float scales

}  // namespace glam
