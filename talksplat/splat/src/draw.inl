// Blending: bins to pixels.
//
// A bin is walked in strips of four rows, a strip in quads of 4 x 4 pixels. For each strip the columns that each
// ellipse covers within its rows are computed, one lane a Gaussian; ellipses are convex, so a quad is touched iff it
// overlaps them. Each quad then blends its own list, one lane a pixel, with everything it accumulates in registers.

constexpr int kQuad = 4;
constexpr int kVectors = kQuad * kQuad / kLanes;  // in a quad
constexpr int kRows = kLanes / kQuad;             // of a quad in a vector
constexpr int kBatch = 64;                        // Gaussians a quad looks at before it asks whether it is opaque
constexpr int kPlane = kBin * kBin;

// A bin's pixels: planes of red, green, blue, alpha (and more for the backward pass), one row of the bin after the other.
struct Tile {
  float* planes;
  int x, y, width, height;  // its place in the image; less than kBin wide or high at the right and lower edge
};

INLINE void store_rows(float* p, F x) {
#if defined(__AVX512F__)
  _mm_storeu_ps(p, _mm512_castps512_ps128(x));
  _mm_storeu_ps(p + kBin, _mm512_extractf32x4_ps(x, 1));
  _mm_storeu_ps(p + 2 * kBin, _mm512_extractf32x4_ps(x, 2));
  _mm_storeu_ps(p + 3 * kBin, _mm512_extractf32x4_ps(x, 3));
#elif defined(__AVX2__)
  _mm_storeu_ps(p, _mm256_castps256_ps128(x));
  _mm_storeu_ps(p + kBin, _mm256_extractf128_ps(x, 1));
#else
  store(p, x);
#endif
}

INLINE F load_rows(const float* p) {
  F x;
  UNROLL for (int row = 0; row < kRows; row++)
    __builtin_memcpy(reinterpret_cast<char*>(&x) + row * kQuad * sizeof(float), p + row * kBin, kQuad * sizeof(float));
  return x;
}

// Where the pixels of a quad lie: column of each lane, row of each lane in vector v.
INLINE F lane_x() { return to_float(iota() & (kQuad - 1)); }
INLINE F lane_y(int v) { return to_float((iota() >> 2) + v * kRows); }

struct QuadPixels {
  F px, py[kVectors];  // pixel centres
  QuadPixels() = default;
  INLINE QuadPixels(int x, int y) {
    px = lane_x() + (float(x) + .5f);
    UNROLL for (int v = 0; v < kVectors; v++) py[v] = lane_y(v) + (float(y) + .5f);
  }
  // 1 inside an image of this size, else 0: pixels outside count as opaque.
  INLINE F inside(int v, const Camera& camera) const {
    return keep(both(gt(set(float(camera.width)), px), gt(set(float(camera.height)), py[v])), set(1));
  }
};

// L - Q at each pixel.
struct Exponent {
  F dx, along;
  INLINE Exponent(const Splat& s, F px) : dx(px - s.x), along(dx * s.a) {}
  INLINE F at(const Splat& s, F dy) const { return s.L - (along + dy * s.b) * dx - dy * s.c * dy; }
};

// gsplat's rule to the letter. Where the next T would be at most kMinT the Gaussian isn't blended any more; T itself
// still takes that step, which keeps it below kMinT for good, and alpha is summed up beside it.
template <bool clamps>
struct Exact {
  QuadPixels pixels;
  F T[kVectors], R[kVectors], G[kVectors], B[kVectors], alpha[kVectors];

  Exact() = default;
  INLINE Exact(int x, int y, const Camera& camera) : pixels(x, y) {
    UNROLL for (int v = 0; v < kVectors; v++) {
      T[v] = pixels.inside(v, camera);
      R[v] = G[v] = B[v] = alpha[v] = set(0);
    }
  }
  INLINE void blend(const Splat& s, int) {
    const Exponent exponent(s, pixels.px);
    UNROLL for (int v = 0; v < kVectors; v++) {
      const F q = exponent.at(s, pixels.py[v] - s.y);
      const F unclamped = exp2(q);
      const F a = keep(ge(q, set(-kLog2Of255)), clamps ? min(unclamped, set(kMaxAlpha)) : unclamped);
      const F next = T[v] - a * T[v];
      const F weight = keep(gt(next, set(kMinT)), a * T[v]);
      R[v] += weight * s.red, G[v] += weight * s.green, B[v] += weight * s.blue, alpha[v] += weight;
      T[v] = next;
    }
  }
  INLINE bool opaque() const {
    F most = T[0];
    UNROLL for (int v = 1; v < kVectors; v++) most = max(most, T[v]);
    return !any(gt(most, set(kMinT)));
  }
  INLINE void finish(float* tile) const {
    UNROLL for (int v = 0; v < kVectors; v++) {
      float* at = tile + v * kRows * kBin;
      store_rows(at, R[v]), store_rows(at + kPlane, G[v]), store_rows(at + 2 * kPlane, B[v]);
      store_rows(at + 3 * kPlane, alpha[v]);
    }
  }
};

// For serving. Three liberties: alpha is clamped once per Gaussian (at its opacity) and not per pixel; a pixel that
// has fallen to kMinT goes on until its whole quad has, which is the more correct picture but not gsplat's; and 2^x
// has a relative error of 7e-5.
struct Fast {
  QuadPixels pixels;
  F T[kVectors], R[kVectors], G[kVectors], B[kVectors];

  Fast() = default;
  INLINE Fast(int x, int y, const Camera& camera) : pixels(x, y) {
    UNROLL for (int v = 0; v < kVectors; v++) {
      T[v] = pixels.inside(v, camera);
      R[v] = G[v] = B[v] = set(0);
    }
  }
  INLINE void blend(const Splat& s, int) {
    const Exponent exponent(s, pixels.px);
    UNROLL for (int v = 0; v < kVectors; v++) {
      const F q = exponent.at(s, pixels.py[v] - s.y);
      const F weight = keep(ge(q, set(-kLog2Of255)), exp2_coarse(q) * T[v]);
      R[v] += weight * s.red, G[v] += weight * s.green, B[v] += weight * s.blue;
      T[v] -= weight;
    }
  }
  INLINE bool opaque() const {
    F most = T[0];
    UNROLL for (int v = 1; v < kVectors; v++) most = max(most, T[v]);
    return !any(gt(most, set(kMinT)));
  }
  INLINE void finish(float* tile) const {
    UNROLL for (int v = 0; v < kVectors; v++) {
      float* at = tile + v * kRows * kBin;
      store_rows(at, R[v]), store_rows(at + kPlane, G[v]), store_rows(at + 2 * kPlane, B[v]);
      store_rows(at + 3 * kPlane, 1.f - T[v]);
    }
  }
};

// The Gaussians of one bin as vectors, and those of them that touch one strip, one quad.
struct BinLists {
  float *x, *y, *tip, *tilt, *reach, *squash;
  float *left, *right, *touching;  // of the strip: columns covered, index in the bin as a float's bits
  float* chosen;                   // of the quad: index in the bin

  BinLists(Scratch& scratch, const Splat* splats, int64_t n) {
    const int64_t padded = (n + 2 * kLanes) / kLanes * kLanes;
    float* p = scratch.bin.get<float>(9 * padded + kBatch + kLanes);
    float** const arrays[] = {&x, &y, &tip, &tilt, &reach, &squash, &left, &right, &touching};
    for (float** array : arrays) *array = p, p += padded;
    chosen = p;
    for (int64_t i = 0; i < n; i++) {
      const Splat& s = splats[i];
      x[i] = s.x, y[i] = s.y, tip[i] = s.tip, tilt[i] = s.tilt, reach[i] = s.reach, squash[i] = s.squash;
    }
    for (int64_t i = n; i % kLanes; i++) x[i] = y[i] = tip[i] = tilt[i] = squash[i] = 0, reach[i] = -1;
  }

  // Those of the n that touch the rows of pixel centres from y0 to y1, still in depth order; returns how many.
  int64_t choose_strip(int64_t n, float y0, float y1) {
    int64_t m = 0;
    const F zero = set(0);
    I index = iota();
    for (int64_t i = 0; i < n; i += kLanes, index += kLanes) {
      const F cy = load(y + i), t = load(tip + i), d0 = y0 - cy, d1 = y1 - cy;
      const F high = clamp(t, d0, d1), low = clamp(-t, d0, d1);
      const F tilts = load(tilt + i), reaches = load(reach + i), squashes = load(squash + i);
      const F high2 = reaches - squashes * high * high, low2 = reaches - squashes * low * low;
      const M touches = both(ge(high2, zero), ge(low2, zero));
      const F cx = load(x + i);
      compress(left + m, touches, cx + (tilts * low - sqrt(low2)));
      compress(right + m, touches, cx + (tilts * high + sqrt(high2)));
      compress(touching + m, touches, (F)index);
      m += count(touches);
    }
    store(left + m, set(1e30f)), store(right + m, set(-1e30f));  // padding that touches no quad
    return m;
  }

  // Of the strip's Gaussians from `begin` to `end`, at most kBatch, those that touch the columns from x0 to x1.
  INLINE int choose_quad(int64_t begin, int64_t end, float x0, float x1) {
    int m = 0;
    for (int64_t i = begin; i < end; i += kLanes) {
      const M touches = both(ge(load(right + i), set(x0)), ge(set(x1), load(left + i)));
      compress(chosen + m, touches, load(touching + i));
      m += count(touches);
    }
    return m;
  }
};

// A bin's Gaussians, front to back, in a row.
inline const Splat* gather(const Splat* splats, const uint32_t* list, int64_t n, Buffer& buffer) {
  Splat* out = buffer.get<Splat>(n);
  for (int64_t i = 0; i < n; i++) out[i] = splats[list[i]];
  return out;
}

// Runs a kernel over the quads of a bin: make(x, y) starts the one at column x, row y of the tile; blend(splat, i) is
// called for those of the bin's `n` splats that touch it, until it is opaque; and finish(pixels) at the end.
template <class Make>
INLINE void walk_bin(const Splat* splats, int64_t n, const Tile& tile, Scratch& scratch, Make make) {
  BinLists lists(scratch, splats, n);
  for (int y = 0; y < tile.height; y += kQuad) {
    const float y0 = float(tile.y + y) + .5f;
    const int64_t touching = lists.choose_strip(n, y0, y0 + (kQuad - 1));
    for (int x = 0; x < tile.width; x += kQuad) {
      const float x0 = float(tile.x + x) + .5f;
      auto kernel = make(x, y);
      for (int64_t begin = 0; begin < touching && !kernel.opaque(); begin += kBatch) {
        const int64_t end = begin + kBatch < touching ? begin + kBatch : touching;
        const int m = lists.choose_quad(begin, end, x0, x0 + (kQuad - 1));
        for (int i = 0; i < m; i++) {
          int32_t index;
          __builtin_memcpy(&index, lists.chosen + i, 4);
          kernel.blend(splats[index], index);
        }
      }
      kernel.finish(tile.planes + y * kBin + x);
    }
  }
}

INLINE Tile tile_at(int bin, int bins_x, const Camera& camera, float* planes) {
  const int x = bin % bins_x * kBin, y = bin / bins_x * kBin;
  const int w = camera.width - x, h = camera.height - y;
  return {planes, x, y, w < kBin ? w : kBin, h < kBin ? h : kBin};
}

// Draws a bin's Gaussians into the planes of its tile.
inline void draw_bin(const Splat* splats, int64_t n, const Tile& tile, const Camera& camera, Mode mode, bool clamps,
                     Scratch& scratch) {
  auto run = [&](auto kernel) {
    walk_bin(splats, n, tile, scratch, [&](int x, int y) { return decltype(kernel)(tile.x + x, tile.y + y, camera); });
  };
  if (mode == Mode::fast) run(Fast());
  else if (clamps) run(Exact<true>());
  else run(Exact<false>());
}

// A tile to its place in colors [H, W, 3] and alphas [H, W], over the background.
inline void write_tile(const Tile& tile, const Camera& camera, float* colors, float* alphas) {
  const float *background = camera.background, red = background[0], green = background[1], blue = background[2];
  for (int y = 0; y < tile.height; y++) {
    const float* from = tile.planes + y * kBin;
    const size_t at = size_t(tile.y + y) * camera.width + tile.x;
    float *out = colors + 3 * at, *out_alpha = alphas + at;
    auto write = [&](int width) {
      for (int x = 0; x < width; x++) {
        const float a = from[3 * kPlane + x], T = 1.f - a;
        out[3 * x] = from[x] + T * red;
        out[3 * x + 1] = from[kPlane + x] + T * green;
        out[3 * x + 2] = from[2 * kPlane + x] + T * blue;
        out_alpha[x] = a;
      }
    };
    if (tile.width == kBin) write(kBin);
    else write(tile.width);
  }
}

inline void write_background(const Tile& tile, const Camera& camera, float* colors, float* alphas) {
  for (int y = 0; y < tile.height; y++) {
    const size_t at = size_t(tile.y + y) * camera.width + tile.x;
    for (int x = 0; x < tile.width; x++)
      for (int c = 0; c < 3; c++) colors[3 * (at + x) + c] = camera.background[c];
    __builtin_memset(alphas + at, 0, tile.width * sizeof(float));
  }
}

void draw(const Prepared& prepared, const Camera& camera, Mode mode, Scratch& scratch, float* colors, float* alphas) {
  const FlushDenormals flush;
  const int64_t* start = prepared.bin_start.data<int64_t>();
  float* planes = scratch.tile.get<float>(4 * kPlane);
  for (int b = 0; b < prepared.bins_x * prepared.bins_y; b++) {
    const Tile tile = tile_at(b, prepared.bins_x, camera, planes);
    const int64_t n = start[b + 1] - start[b];
    if (n == 0) {
      write_background(tile, camera, colors, alphas);
      continue;
    }
    const uint32_t* list = prepared.bin_list.data<uint32_t>() + start[b];
    const Splat* splats = gather(prepared.splats.data<Splat>(), list, n, scratch.gathered);
    draw_bin(splats, n, tile, camera, mode, prepared.clamps, scratch);
    write_tile(tile, camera, colors, alphas);
  }
}
