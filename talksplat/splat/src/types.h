// What the Python binding and the kernels share: plain structs and a table of functions. Nothing in this header
// depends on an instruction set, and nothing here may become a weak symbol: the linker keeps one copy of those,
// and it could be the one compiled for AVX-512.
#pragma once
#include <cstddef>
#include <cstdint>

namespace talksplat {

inline constexpr int kBin = 32;              // pixels a side; a bin is drawn as 8 x 8 quads of 4 x 4 pixels
inline constexpr int kMaxSize = 256 * kBin;  // bin columns and rows are kept in 8 bits
inline constexpr int kAttributes = 14;       // means xyz, quats wxyz, scales, opacity, colors rgb
inline constexpr int kMaxBases = 256;        // of an avatar
inline constexpr int kSsimWindow = 11;       // pixels

// Memory that grows and is kept. What it held is lost when it grows.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer();
  template <class T>
  [[gnu::always_inline]] T* get(size_t count) {
    return static_cast<T*>(reserve(count * sizeof(T)));
  }
  template <class T>
  [[gnu::always_inline]] T* data() const {
    return static_cast<T*>(memory_);
  }

 private:
  void* reserve(size_t bytes);  // aligned to 64 bytes; throws std::bad_alloc
  void* memory_ = nullptr;
  size_t bytes_ = 0;
};

struct Gaussians {
  int64_t count;
  const float *means, *quats, *scales, *opacities, *colors;  // [n, 3], [n, 4], [n, 3], [n], [n, 3]
};

struct GaussianBuffers {  // to be written: gradients, or blended Gaussians
  float *means, *quats, *scales, *opacities, *colors;  // the same shapes
};

struct Blendshapes {
  int64_t count;              // N
  int rank;                   // K
  const float* canonical;     // [14, N]
  const int8_t* bases;        // [14, K, N]
  const float* basis_scales;  // [14, K]
};

struct Camera {
  int width, height;
  const float* viewmat;  // [4, 4] world to camera, +z forward, +y down
  const float* K;        // [3, 3]
  float background[3];
};

enum class Mode { exact, fast };

// The visible Gaussians of a frame, the depth order, and for each bin those that touch it, front to back.
struct Prepared {
  Buffer splats, depths, order, bin_start, bin_list;
  int64_t visible = 0;
  int bins_x = 0, bins_y = 0;
};

// Memory of one frame in the making; any thread may use it, one at a time.
struct Scratch {
  Buffer planes, keys, cursor, gathered, bin, rows, quads, tile, moments, sums, ring, maps;
  Prepared prepared;
};

struct Kernels {
  const char* name;
  // Project, cull, sort and bin.
  void (*prepare)(const Gaussians&, const Camera&, Mode, Scratch&, Prepared&);
  // Draw into colors [H, W, 3] and alphas [H, W].
  void (*draw)(const Prepared&, const Camera&, Mode, Scratch&, float* colors, float* alphas);
  // GaussianBuffers for the exact drawing that gave colors and alphas; writes every element of `out`.
  void (*backward)(const Gaussians&, const Prepared&, const Camera&, Scratch&, const float* colors, const float* alphas,
                   const float* grad_colors, const float* grad_alphas, const GaussianBuffers& out);
  // Draw the bins that a moving Gaussian touches, or touched when `touched` was written; returns how many.
  int64_t (*draw_dirty)(const Prepared& still, const Prepared& moving, const Camera&, Mode, Scratch&, uint8_t* touched,
                        float* colors, float* alphas);
  // Blend, activate, and draw over plate [H, W, 3] into out [H, W, 3].
  void (*draw_onto)(const Blendshapes&, const float* weights, const Camera&, Mode, Scratch&, const uint8_t* plate,
                    uint8_t* out);
  // Blend and activate into the arrays of `out`.
  void (*blend)(const Blendshapes&, const float* weights, Scratch&, const GaussianBuffers& out);
  // The mean SSIM of two images [H, W, C]; with `grad`, also its gradient with respect to `a`.
  double (*ssim)(const float* a, const float* b, int height, int width, int channels, float data_range, Scratch&,
                 float* grad);
};

const Kernels* find_kernels(const char* isa);  // null where unknown, not built, or not supported by this processor
const char* const* available_isas();           // fastest first, ends with null

}  // namespace talksplat
