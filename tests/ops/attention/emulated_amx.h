#pragma once
#include <immintrin.h>

// The tile instructions of AMX in plain code, for processors without them. Force-included before a
// source that uses the intrinsics (CMakeLists.txt), it takes their place. Stricter than hardware:
// whatever a processor would fault on, or would quietly accept though no sensible program does it,
// ends the process with a sentence.
namespace longspan::test::emulated_amx {

void LoadConfig(const void* config);
void Release();
void Zero(int tile);
void Load(int tile, const void* base, long stride);
void Store(int tile, void* base, long stride);
void DotProduct(int sum, int a, int b);

// Of all threads since the process started: threads that hold a configuration now, configurations
// loaded, products.
struct Counts {
  long configured, loads, products;
};
Counts CountsSoFar();

}  // namespace longspan::test::emulated_amx

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig ::longspan::test::emulated_amx::LoadConfig
#define _tile_release ::longspan::test::emulated_amx::Release
#define _tile_zero ::longspan::test::emulated_amx::Zero
#define _tile_loadd ::longspan::test::emulated_amx::Load
#define _tile_stored ::longspan::test::emulated_amx::Store
#define _tile_dpbf16ps ::longspan::test::emulated_amx::DotProduct
