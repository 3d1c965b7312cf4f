// Blending: bins to pixels.
//
// A bin is walked in strips of four rows, a strip in quads of 4 x 4 pixels. For each strip the columns that each
// ellipse covers within its rows are computed, one lane a Gaussian; ellipses are convex, so a quad is touched iff it
// overlaps them. Each quad then blends its own list, one lane a pixel, with everything it accumulates in registers.

constexpr int kQuad = 4;
constexpr int kVectors = kQuad * kQuad / kLanes;  // in a quad
constexpr int kRows = kLanes / kQuad;             // of a quad in a vector
constexpr int kBatch = 64;                        // a strip's Gaussians between two looks at which quads are opaque
constexpr int kPlane = kBin * kBin + 16;          // not a power of two, because of cache sets

// A bin's pixels: planes of red, green, blue and alpha (or what the backward pass starts from), row by row.
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

// A value for each of a quad's pixels. Copied vector by vector: compilers would copy the array with slow string moves.
struct Pixels {
  F v[kVectors];

  INLINE explicit Pixels(F x = set(0)) {
    UNROLL for (F& each : v) each = x;
  }
  INLINE Pixels(const Pixels& other) { *this = other; }
  INLINE Pixels& operator=(const Pixels& other) {
    UNROLL for (int i = 0; i < kVectors; i++) v[i] = other.v[i];
    return *this;
  }
  INLINE F& operator[](int i) { return v[i]; }
  INLINE F operator[](int i) const { return v[i]; }
};

// A Gaussian within a strip, with all that depends on the row done: L - Q = base - (a dx + slope) dx.
struct Row {
  Pixels base, slope;
  Splat splat;  // its id is its place in the bin

  INLINE void start(const Splat& s, const Pixels& py) {
    UNROLL for (int v = 0; v < kVectors; v++) {
      const F dy = py[v] - s.y;
      slope[v] = dy * s.b, base[v] = s.L - dy * s.c * dy;
    }
    splat = s;
  }
  INLINE F exponent(int v, F dx) const { return base[v] - (dx * splat.a + slope[v]) * dx; }
};

// 4 x 4 pixels on their way from front to back. Those outside the image count as opaque.
struct Quad {
  F px;
  Pixels T;

  INLINE Quad(int x, int y, const Camera& camera) : px(lane_x() + (float(x) + .5f)) {
    const M in_width = gt(set(float(camera.width)), px);
    UNROLL for (int v = 0; v < kVectors; v++)
      T[v] = keep(both(in_width, gt(set(float(camera.height)), lane_y(v) + (float(y) + .5f))), set(1));
  }
  INLINE bool opaque() const {
    F most = T[0];
    UNROLL for (int v = 1; v < kVectors; v++) most = max(most, T[v]);
    return !any(gt(most, set(kMinT)));
  }
};

struct Colors {
  Pixels red, green, blue;
};

// gsplat's rule to the letter. Where the next T would be at most kMinT the Gaussian isn't blended any more; T itself
// still takes that step, which keeps it below kMinT for good, and alpha is summed up beside it. Alphas need clamping
// only where an opacity is above the limit.
template <bool clamps>
struct Exact : Quad {
  Colors sum;
  Pixels alpha;

  using Quad::Quad;
  INLINE void blend(const Row& row) {
    const Splat& s = row.splat;
    const F dx = px - s.x;
    UNROLL for (int v = 0; v < kVectors; v++) {
      const F q = row.exponent(v, dx), unclamped = exp2(q, kExp2);
      const F a = keep(ge(q, set(-kLog2Of255)), clamps ? min(unclamped, set(kMaxAlpha)) : unclamped);
      const F next = minus_product(T[v], a, T[v]);
      const F weight = keep(gt(next, set(kMinT)), a * T[v]);
      sum.red[v] += weight * s.red, sum.green[v] += weight * s.green, sum.blue[v] += weight * s.blue;
      alpha[v] += weight;
      T[v] = next;
    }
  }
  INLINE F opacity(int v) const { return alpha[v]; }
};

// For serving. Three liberties: alpha is clamped once per Gaussian (at its opacity) and not per pixel; a pixel that
// has fallen to kMinT goes on until its whole quad has, which is the more correct picture but not gsplat's; and 2^x
// is coarser.
struct Fast : Quad {
  Colors sum;

  using Quad::Quad;
  INLINE void blend(const Row& row) {
    const Splat& s = row.splat;
    const F dx = px - s.x;
    UNROLL for (int v = 0; v < kVectors; v++) {
      const F q = row.exponent(v, dx);
      const F weight = keep(ge(q, set(-kLog2Of255)), exp2(q, kExp2Coarse) * T[v]);
      sum.red[v] += weight * s.red, sum.green[v] += weight * s.green, sum.blue[v] += weight * s.blue;
      T[v] -= weight;
    }
  }
  INLINE F opacity(int v) const { return 1.f - T[v]; }
};

// A quad's pixels to the planes of a tile.
template <class Kernel>
INLINE void store_quad(const Kernel& k, float* at) {
  UNROLL for (int v = 0; v < kVectors; v++, at += kRows * kBin) {
    store_rows(at, k.sum.red[v]), store_rows(at + kPlane, k.sum.green[v]);
    store_rows(at + 2 * kPlane, k.sum.blue[v]), store_rows(at + 3 * kPlane, k.opacity(v));
  }
}

// A bin's Gaussians as vectors, and those of them that touch a strip, a batch at a time.
struct BinLists {
  const Splat* splats;  // front to back
  int64_t n;
  float *x, *y, *tip, *tilt, *reach, *squash;
  int64_t next;                        // the first that the strip hasn't looked at
  int touching;                        // how many of the batch's rows there are
  Row* rows;
  float left[kBatch + 2 * kLanes], right[kBatch + 2 * kLanes], index[kBatch + 2 * kLanes];
  float chosen[kBatch + 2 * kLanes];  // rows that touch the quad, as a float's bits

  BinLists(Scratch& scratch, const Splat* splats, int64_t n) : splats(splats), n(n) {
    const int64_t padded = (n + kLanes - 1) / kLanes * kLanes;
    rows = scratch.rows.get<Row>(kBatch + kLanes);
    float* p = scratch.bin.get<float>(6 * padded);
    float** const arrays[] = {&x, &y, &tip, &tilt, &reach, &squash};
    for (float** array : arrays) *array = p, p += padded;
    for (int64_t i = 0; i < n; i++) {
      const Splat& s = splats[i];
      x[i] = s.x, y[i] = s.y, tip[i] = s.tip, tilt[i] = s.tilt, reach[i] = s.reach, squash[i] = s.squash;
    }
    for (int64_t i = n; i < padded; i++) x[i] = y[i] = tip[i] = tilt[i] = squash[i] = 0, reach[i] = -1;
  }

  // Goes on to the next that touch the strip of pixel rows at y0 to y0 + 3: at least kBatch where there are as many.
  void next_batch(float y0) {
    touching = 0;
    const F zero = set(0);
    for (; next < n && touching < kBatch; next += kLanes) {
      const int64_t i = next;
      const F cy = load(y + i), t = load(tip + i), d0 = y0 - cy, d1 = y0 + float(kQuad - 1) - cy;
      const F high = clamp(t, d0, d1), low = clamp(-t, d0, d1);
      const F tilts = load(tilt + i), reaches = load(reach + i), squashes = load(squash + i);
      const F high2 = reaches - squashes * high * high, low2 = reaches - squashes * low * low;
      const M touches = both(ge(high2, zero), ge(low2, zero));
      const F cx = load(x + i);
      compress(left + touching, touches, cx + (tilts * low - rough_sqrt(low2)));
      compress(right + touching, touches, cx + (tilts * high + rough_sqrt(high2)));
      compress(index + touching, touches, (F)(iota() + int32_t(i)));
      touching += count(touches);
    }
    store(left + touching, set(1e30f)), store(right + touching, set(-1e30f));  // padding that touches no quad
    Pixels py;
    UNROLL for (int v = 0; v < kVectors; v++) py[v] = lane_y(v) + y0;
    for (int k = 0; k < touching; k++) {
      int32_t i;
      __builtin_memcpy(&i, index + k, 4);
      rows[k].start(splats[i], py);
    }
  }

  // Of the batch, those that touch the quad of pixel columns at x0 to x0 + 3; returns how many.
  INLINE int choose(float x0) {
    int m = 0;
    for (int i = 0; i < touching; i += kLanes) {
      const M touches = both(ge(load(right + i), set(x0)), ge(set(x0 + float(kQuad - 1)), load(left + i)));
      compress(chosen + m, touches, (F)(iota() + i));
      m += count(touches);
    }
    return m;
  }
};

// A bin's Gaussians, front to back, in a row; their ids become their places in it.
inline const Splat* gather(const Splat* splats, const uint32_t* list, int64_t n, Buffer& buffer) {
  Splat* out = buffer.get<Splat>(n);
  for (int64_t i = 0; i < n; i++) {
    out[i] = splats[list[i]];
    out[i].id = int32_t(i);
  }
  return out;
}

// A function of its own, so that the compiler gives all of its registers to this loop.
template <class Kernel>
__attribute__((noinline)) void blend_all(Kernel& kernel, const Row* rows, const float* chosen, int m) {
  Kernel k = kernel;
  for (int i = 0; i < m; i++) {
    int32_t row;
    __builtin_memcpy(&row, chosen + i, 4);
    k.blend(rows[row]);
  }
  kernel = k;
}

// Runs a kernel over the quads of a bin. make(x, y) starts one at column x, row y of the tile; its blend(row) is called
// for each Gaussian that touches it until it is opaque; finish(kernel, x, y) takes the result.
template <class Make, class Finish>
INLINE void walk_bin(const Splat* splats, int64_t n, const Tile& tile, Scratch& scratch, Make make, Finish finish) {
  using Kernel = decltype(make(0, 0));
  BinLists lists(scratch, splats, n);
  Kernel* kernels = scratch.quads.get<Kernel>(kBin / kQuad);
  for (int y = 0; y < tile.height; y += kQuad) {
    const float y0 = float(tile.y + y) + .5f, x0 = float(tile.x) + .5f;
    for (int x = 0; x < tile.width; x += kQuad) kernels[x / kQuad] = make(x, y);
    lists.next = 0;
    for (bool more = true; more && lists.next < n;) {
      lists.next_batch(y0);
      if (lists.touching == 0) break;
      more = false;
      for (int x = 0; x < tile.width; x += kQuad) {
        Kernel& kernel = kernels[x / kQuad];
        if (kernel.opaque()) continue;
        more = true;
        blend_all(kernel, lists.rows, lists.chosen, lists.choose(x0 + float(x)));
      }
    }
    for (int x = 0; x < tile.width; x += kQuad) finish(kernels[x / kQuad], x, y);
  }
}

INLINE Tile tile_at(int bin, int bins_x, const Camera& camera, float* planes) {
  const int x = bin % bins_x * kBin, y = bin / bins_x * kBin;
  const int w = camera.width - x, h = camera.height - y;
  return {planes, x, y, w < kBin ? w : kBin, h < kBin ? h : kBin};
}

// Draws a bin's Gaussians into the planes of its tile.
template <class Kernel>
void draw_bin_as(const Splat* splats, int64_t n, const Tile& tile, const Camera& camera, Scratch& scratch) {
  walk_bin(
      splats, n, tile, scratch, [&](int x, int y) { return Kernel(tile.x + x, tile.y + y, camera); },
      [&](const Kernel& k, int x, int y) { store_quad(k, tile.planes + y * kBin + x); });
}

inline void draw_bin(const Splat* splats, int64_t n, const Tile& tile, const Camera& camera, Mode mode,
                     Scratch& scratch) {
  if (mode == Mode::fast) return draw_bin_as<Fast>(splats, n, tile, camera, scratch);
  bool clamps = false;
  for (int64_t i = 0; i < n; i++) clamps |= splats[i].L > kLog2MaxAlpha;
  clamps ? draw_bin_as<Exact<true>>(splats, n, tile, camera, scratch)
         : draw_bin_as<Exact<false>>(splats, n, tile, camera, scratch);
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
  float row[3 * kBin];
  for (int i = 0; i < 3 * kBin; i++) row[i] = camera.background[i % 3];
  for (int y = 0; y < tile.height; y++) {
    const size_t at = size_t(tile.y + y) * camera.width + tile.x;
    __builtin_memcpy(colors + 3 * at, row, 3 * tile.width * sizeof(float));
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
    draw_bin(splats, n, tile, camera, mode, scratch);
    write_tile(tile, camera, colors, alphas);
  }
}

// Still Gaussians are prepared once, moving ones for each frame. The bins that a moving one touches, now or in the
// frame before, are drawn anew from both; everything else in colors and alphas stays.
int64_t draw_dirty(const Prepared& still, const Prepared& moving, const Camera& camera, Mode mode, Scratch& scratch,
                   uint8_t* touched, float* colors, float* alphas) {
  const FlushDenormals flush;
  const Splat *still_splats = still.splats.data<Splat>(), *moving_splats = moving.splats.data<Splat>();
  const double *still_depths = still.depths.data<double>(), *moving_depths = moving.depths.data<double>();
  const int64_t *still_start = still.bin_start.data<int64_t>(), *moving_start = moving.bin_start.data<int64_t>();
  const uint32_t *still_list = still.bin_list.data<uint32_t>(), *moving_list = moving.bin_list.data<uint32_t>();
  float* planes = scratch.tile.get<float>(4 * kPlane);
  int64_t drawn = 0;
  for (int b = 0; b < still.bins_x * still.bins_y; b++) {
    const uint32_t *s = still_list + still_start[b], *s_end = still_list + still_start[b + 1];
    const uint32_t *m = moving_list + moving_start[b], *m_end = moving_list + moving_start[b + 1];
    const bool before = touched[b], now = m != m_end;
    touched[b] = now;
    if (!before && !now) continue;
    drawn++;
    const int64_t n = (s_end - s) + (m_end - m);
    Splat* splats = scratch.gathered.get<Splat>(n);
    for (int64_t i = 0; i < n; i++) {  // merge by depth; where equal, the still one first
      const bool take_still = m == m_end || (s != s_end && still_depths[*s] <= moving_depths[*m]);
      splats[i] = take_still ? still_splats[*s++] : moving_splats[*m++];
    }
    const Tile tile = tile_at(b, still.bins_x, camera, planes);
    if (n == 0) {
      write_background(tile, camera, colors, alphas);
      continue;
    }
    draw_bin(splats, n, tile, camera, mode, scratch);
    write_tile(tile, camera, colors, alphas);
  }
  return drawn;
}
