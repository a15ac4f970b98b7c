// The kernels of Intel AMX: matmul and attention in tiles, and everything else as with AVX-512. decode.cpp includes this
// file once, with the compiler switched to these instructions.

namespace {
namespace amx {

#include "tile_packing.hpp"

#include "tile_matmul.hpp"

#include "tile_attention.hpp"

constexpr Kernels with_tiles() {
    Kernels kernels = avx512::kernels;
    kernels.prefill_rows = PREFILL_ROWS;
    kernels.output_block = FEW_GROUPS * GROUP_ROWS;
    kernels.scratch_floats = scratch_floats;
    kernels.tile_numbers = tile_numbers;
    kernels.split = split;
    kernels.matmul = matmul;
    kernels.unpack = unpack;
    kernels.row_bytes = group_bytes;
    kernels.measure = measure;
    kernels.pack = pack;
    kernels.attend = attend;
    kernels.attention_rows = QUERY_ROWS;
    kernels.attention_floats = attention_floats;
    return kernels;
}

// A constant of the compiler: code that runs when the library is loaded must run on every processor.
constexpr Kernels kernels = with_tiles();

// Returns whether the processor has the instructions and the system lets this process use them. Threads inherit it.
bool available() {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    constexpr unsigned BFLOAT16 = 1u << 22, TILES = 1u << 24;
    if ((d & BFLOAT16) == 0 || (d & TILES) == 0) return false;
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM and XFEATURE_XTILEDATA of Linux
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

}  // namespace amx
}  // namespace
