"""What this machine can do, measured in the same run as what is compared with it: products and copies.

dense   GFLOP/s of one product of the layer's size: the best of torch's mm with the second operand as it lies (NN) or
        transposed (NT), and of oneDNN's batch-reduce GEMM (brgemm) on operands packed before the clock starts; in
        bfloat16 also the best in float32, which is the faster on CPUs without bfloat16 instructions
copy    bytes read and written per second by a threaded copy between warm tensors larger than the caches
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from common import medians
from torch import Tensor

_BRGEMM = """
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

// a [M, K]; b in panels [N / 64][K / 2][64][2] (bfloat16) or [N / 64][K][64]; c float [M, N]; M a multiple of 128.
void brgemm(const at::Tensor& a, const at::Tensor& b, const at::Tensor& c) {
  const int64_t M = a.size(0), K = a.size(1), N = c.size(1), columns = N / 64;
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const T* const a_data = a.const_data_ptr<T>();
    const T* const b_data = b.const_data_ptr<T>();
    float* const c_data = c.mutable_data_ptr<float>();
    at::parallel_for(0, M / 128 * columns, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i / columns * 128, column = i % columns * 64;
        at::native::cpublas::brgemm(128, 64, K, K, 64, N, false, a_data + row * K, b_data + column * K,
                                    c_data + row * N + column, !std::is_same_v<T, float>);
      }
      at::native::cpublas::brgemm_release();
    });
  };
  a.scalar_type() == at::kFloat ? run(float{}) : run(at::BFloat16{});
}
"""


@functools.cache
def _brgemm() -> Callable[[Tensor, Tensor, Tensor], None] | None:
    """Compiled here, as torch offers it to C++ only; None where that fails."""
    from torch.utils.cpp_extension import load_inline

    try:
        module: Any = load_inline(
            "glam_reference_brgemm", _BRGEMM, functions="brgemm", extra_cflags=["-O2", "-fopenmp"]
        )
    except (OSError, RuntimeError, ImportError) as error:
        print(f"brgemm is left out of the dense rate: {str(error).splitlines()[0]}")
        return None
    return module.brgemm


def _panels(b: Tensor) -> Tensor:
    K, N = b.shape
    if b.dtype == torch.float32:
        return b.view(K, N // 64, 64).transpose(0, 1).contiguous()
    return b.view(K // 2, 2, N // 64, 64).permute(2, 0, 3, 1).contiguous()


def dense_rate(dtype: torch.dtype, M: int, K: int, N: int, repeats: int) -> tuple[float, str]:
    """FLOP per second, and whose."""
    a, b = torch.randn(M, K).to(dtype), torch.randn(K, N).to(dtype)
    bt, out, c = b.t().contiguous(), torch.empty(M, N, dtype=dtype), torch.empty(M, N)
    contenders: dict[str, Callable[[], object]] = {
        "mm NN": lambda: torch.mm(a, b, out=out),
        "mm NT": lambda: torch.mm(a, bt.t(), out=out),
    }
    if (brgemm := _brgemm()) is not None:
        panels = _panels(b)
        try:
            brgemm(a, panels, c)
            torch.testing.assert_close(c, a.float() @ b.float(), rtol=2e-2, atol=2e-1)
            contenders["brgemm"] = lambda: brgemm(a, panels, c)
        except RuntimeError as error:
            print(f"brgemm is left out of the dense rate: {str(error).splitlines()[0]}")
    seconds = medians(contenders, repeats)
    best = min(seconds, key=lambda name: seconds[name])
    found = 2.0 * M * K * N / seconds[best], best
    if dtype == torch.bfloat16:
        rate, whose = dense_rate(torch.float32, M, K, N, repeats)
        return max(found, (rate, f"{whose} in float32"))
    return found


def copy_rate(repeats: int, megabytes: int = 256) -> float:
    """Bytes per second, reads and writes added."""
    source = torch.ones(megabytes << 18)
    target = torch.ones_like(source)
    seconds = medians({"copy": lambda: target.copy_(source)}, repeats)
    return 2.0 * source.nbytes / seconds["copy"]
