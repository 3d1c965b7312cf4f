// Gaussians to ellipses: projection, culling, depth order and bins.
//
// An ellipse is where alpha >= 1/255. In powers of two, alpha = 2^(L - Q) with Q = a dx^2 + b dx dy + c dy^2 and
// L = log2(opacity), so a Gaussian touches a pixel iff Q <= limit = L + log2(255).

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLog2Of255 = 7.994353436858858f;
// gsplat 1.5.3's rules.
constexpr float kLowPass = .3f;        // pixels^2, added to the diagonal of the 2D covariance
constexpr float kNear = .01f;          // metres, or whatever unit the means have
constexpr float kMaxAlpha = .999f;     // later versions of gsplat use .99
constexpr float kLog2MaxAlpha = -.0014434168f;
constexpr float kMinAlpha = 1.f / 255.f;
constexpr float kMinT = 1e-4f;         // a pixel stops before its transmittance would fall to this
constexpr float kBeyond = .15f;        // of the image's size: how far outside the Jacobian still follows a centre

constexpr float kMaxReach = 1e8f;      // pixels; beyond it products of floats overflow
constexpr int kChunk = 1024;           // Gaussians that are loaded and projected at a time; a multiple of kLanes
constexpr int kStride = kChunk + 16;   // of their planes: a power of two would put all planes into the same cache sets

// One visible Gaussian: a cache line.
struct alignas(64) Splat {
  float x, y;               // centre in pixels
  float a, b, c, L;         // see above
  float red, green, blue;
  // The ellipse's extent within some rows: it reaches x +- (tilt * dy + sqrt(reach - squash * dy^2)), and its
  // outermost points lie at dy = +-tip.
  float tip, tilt, reach, squash;
  int32_t id;               // index in the input
  uint8_t first_x, last_x, first_y, last_y;  // the bins of its bounding box
};
static_assert(sizeof(Splat) == 64);

struct Range {
  float low, high;
};

struct View {
  float fx, fy, cx, cy;
  float r00, r01, r02, r10, r11, r12, r20, r21, r22, t0, t1, t2;
  Range limit_x, limit_y;  // of x/z and y/z in the Jacobian

  explicit View(const Camera& camera) {
    const float *v = camera.viewmat, *K = camera.K;
    fx = K[0], fy = K[4], cx = K[2], cy = K[5];
    r00 = v[0], r01 = v[1], r02 = v[2], t0 = v[3];
    r10 = v[4], r11 = v[5], r12 = v[6], t1 = v[7];
    r20 = v[8], r21 = v[9], r22 = v[10], t2 = v[11];
    const float w = float(camera.width), h = float(camera.height);
    limit_x = {(-cx - kBeyond * w) / fx, (w - cx + kBeyond * w) / fx};
    limit_y = {(-cy - kBeyond * h) / fy, (h - cy + kBeyond * h) / fy};
  }
};

// kLanes Gaussians on their way to the image plane.
struct Projection {
  F tx, ty, tz, iz;                               // centre in camera space, 1 / z
  F ux, uy;                                       // x/z, y/z after clamping
  F qw, qx, qy, qz, iq;                           // unit quaternion, 1 / its former length
  F m00, m01, m02, m10, m11, m12, m20, m21, m22;  // its rotation
  F w00, w01, w02, w10, w11, w12;                 // W = Jacobian * view rotation
  F e00, e01, e02, e10, e11, e12;                 // E = W * rotation
  F c00, c01, c11, det;                           // covariance = (E S)(E S)^T + low-pass, and its determinant

  // planes: attribute k of these Gaussians lies at planes + k * kStride
  INLINE Projection(const View& v, const float* planes) {
    auto plane = [planes](int k) { return load(planes + k * kStride); };
    const F x = plane(0), y = plane(1), z = plane(2);
    tx = v.r00 * x + v.r01 * y + v.r02 * z + v.t0;
    ty = v.r10 * x + v.r11 * y + v.r12 * z + v.t1;
    tz = v.r20 * x + v.r21 * y + v.r22 * z + v.t2;
    iz = 1.f / tz;

    qw = plane(3), qx = plane(4), qy = plane(5), qz = plane(6);
    iq = 1.f / sqrt(qw * qw + qx * qx + qy * qy + qz * qz);
    qw *= iq, qx *= iq, qy *= iq, qz *= iq;
    m00 = 1.f - 2.f * (qy * qy + qz * qz), m01 = 2.f * (qx * qy - qw * qz), m02 = 2.f * (qx * qz + qw * qy);
    m10 = 2.f * (qx * qy + qw * qz), m11 = 1.f - 2.f * (qx * qx + qz * qz), m12 = 2.f * (qy * qz - qw * qx);
    m20 = 2.f * (qx * qz - qw * qy), m21 = 2.f * (qy * qz + qw * qx), m22 = 1.f - 2.f * (qx * qx + qy * qy);

    ux = clamp(tx * iz, set(v.limit_x.low), set(v.limit_x.high));
    uy = clamp(ty * iz, set(v.limit_y.low), set(v.limit_y.high));
    const F jx = v.fx * iz, jxz = -(v.fx * ux * iz), jy = v.fy * iz, jyz = -(v.fy * uy * iz);
    w00 = jx * v.r00 + jxz * v.r20, w01 = jx * v.r01 + jxz * v.r21, w02 = jx * v.r02 + jxz * v.r22;
    w10 = jy * v.r10 + jyz * v.r20, w11 = jy * v.r11 + jyz * v.r21, w12 = jy * v.r12 + jyz * v.r22;
    e00 = w00 * m00 + w01 * m10 + w02 * m20, e10 = w10 * m00 + w11 * m10 + w12 * m20;
    e01 = w00 * m01 + w01 * m11 + w02 * m21, e11 = w10 * m01 + w11 * m11 + w12 * m21;
    e02 = w00 * m02 + w01 * m12 + w02 * m22, e12 = w10 * m02 + w11 * m12 + w12 * m22;

    const F s0 = plane(7), s1 = plane(8), s2 = plane(9);
    const F a0 = e00 * s0, a1 = e01 * s1, a2 = e02 * s2, b0 = e10 * s0, b1 = e11 * s1, b2 = e12 * s2;
    c00 = a0 * a0 + a1 * a1 + a2 * a2;
    c01 = a0 * b0 + a1 * b1 + a2 * b2;
    c11 = b0 * b0 + b1 * b1 + b2 * b2;
    // By Cauchy and Binet: a sum of squares, where c00 * c11 - c01 * c01 would cancel for long needles.
    const F k01 = a0 * b1 - a1 * b0, k02 = a0 * b2 - a2 * b0, k12 = a1 * b2 - a2 * b1;
    det = k01 * k01 + k02 * k02 + k12 * k12 + kLowPass * (c00 + c11) + kLowPass * kLowPass;
    c00 += kLowPass, c11 += kLowPass;
  }
};

// The columns that an ellipse covers within the rows from y0 to y1; false where it covers none.
INLINE bool columns_within(const Splat& s, float y0, float y1, Range& columns) {
  const float d0 = y0 - s.y, d1 = y1 - s.y;
  auto clip = [&](float d) { return d < d0 ? d0 : d > d1 ? d1 : d; };
  const float right = clip(s.tip), left = clip(-s.tip);
  const float r2 = s.reach - s.squash * right * right, l2 = s.reach - s.squash * left * left;
  if (!(r2 >= 0.f && l2 >= 0.f)) return false;
  columns = {s.x + s.tilt * left - __builtin_sqrtf(l2), s.x + s.tilt * right + __builtin_sqrtf(r2)};
  return true;
}

// Calls visit(bin, 1) for every bin that the ellipse touches, and perhaps visit(bin, 0) before that.
template <class Visit>
INLINE void for_each_bin(const Splat& s, int bins_x, Visit visit) {
  const int x0 = s.first_x, x1 = s.last_x, y0 = s.first_y, y1 = s.last_y;
  if (x1 - x0 <= 1 && y1 - y0 <= 1) {  // nearly always, and without a branch that can't be predicted
    const int wide = x1 - x0, high = y1 - y0;
    visit(y1 * bins_x + x1, wide & high), visit(y1 * bins_x + x0, high);
    visit(y0 * bins_x + x1, wide), visit(y0 * bins_x + x0, 1);
    return;
  }
  for (int y = y0; y <= y1; y++) {  // leave the box's corners out
    Range columns;
    if (!columns_within(s, y * kBin + .5f, y * kBin + kBin - .5f, columns)) continue;
    const float low = (columns.low - .5f) * (1.f / kBin), high = (columns.high - .5f) * (1.f / kBin);
    const int first = low > x0 ? int(low) : x0, last = high < x1 ? int(__builtin_floorf(high)) : x1;
    for (int x = first; x <= last; x++) visit(y * bins_x + x, 1);
  }
}

// Projects the chunk in `planes` and appends its visible Gaussians to `splats`, their depths to `depths`; returns how
// many. Depths are double: float would swap some neighbours.
inline int64_t project_chunk(const float* planes, int64_t first_id, int count, const View& view, const Camera& camera,
                             Mode mode, int bins_x, int bins_y, Splat* splats, double* depths) {
  const float width = float(camera.width), height = float(camera.height);
  const F zero = set(0), last_x = set(float(bins_x - 1)), last_y = set(float(bins_y - 1));
  const float max_L = mode == Mode::fast ? kLog2MaxAlpha : 1e30f;  // fast clamps here, once
  Splat* out = splats;
  for (int i = 0; i < count; i += kLanes) {
    const float* at = planes + i;
    const Projection p(view, at);
    F poison = zero;  // becomes NaN where an attribute isn't finite
    UNROLL for (int k = 0; k < kAttributes; k++) poison += load(at + k * kStride) * 0.f;

    const F opacity = load(at + 10 * kStride);
    const F scale = kLog2e / p.det;
    const F x = view.fx * p.tx * p.iz + view.cx, y = view.fy * p.ty * p.iz + view.cy;
    const F L = log2(opacity), limit = max(L + kLog2Of255, zero);
    const F a = .5f * p.c11 * scale, b = -(p.c01 * scale), c = .5f * p.c00 * scale;
    const F half_w = sqrt(2.f / kLog2e * limit * p.c00), half_h = sqrt(2.f / kLog2e * limit * p.c11);
    const float per_bin = 1.f / kBin;
    const F x0 = max((x - half_w - .5f) * per_bin, zero), x1 = min((x + half_w - .5f) * per_bin, last_x);
    const F y0 = max((y - half_h - .5f) * per_bin, zero), y1 = min((y + half_h - .5f) * per_bin, last_y);

    // Every test is false for a NaN.
    M visible = both(ge(p.tz, set(kNear)), ge(opacity, set(kMinAlpha)));
    visible = both(visible, both(gt(p.det, zero), ge(zero, poison)));
    visible = both(visible, both(gt(set(kMaxReach), half_w), gt(set(kMaxReach), half_h)));
    visible = both(visible, both(ge(x1, zero), ge(y1, zero)));
    visible = both(visible, both(gt(set(width), x - half_w), gt(set(height), y - half_h)));
    unsigned lanes = unsigned(bits(visible));
    if (count - i < kLanes) lanes &= (1u << (count - i)) - 1;
    if (!lanes) continue;

    enum { X, Y, A, B, C, LogOpacity, Tip, Tilt, Reach, Squash, X0, X1, Y0, Y1, Fields };
    alignas(64) float f[Fields][kLanes];
    store(f[X], x), store(f[Y], y), store(f[A], a), store(f[B], b), store(f[C], c);
    store(f[LogOpacity], min(L, set(max_L)));
    store(f[Tip], p.c01 / p.c00 * half_w), store(f[Tilt], p.c01 / p.c11);
    // A little more than the ellipse, so that rounding loses no pixel: each is tested by its alpha again.
    store(f[Reach], limit * 1.01f / a), store(f[Squash], p.det / (p.c11 * p.c11));
    store(f[X0], x0), store(f[X1], x1), store(f[Y0], y0), store(f[Y1], y1);
    const D z = to_double(load(at)) * double(view.r20) + to_double(load(at + kStride)) * double(view.r21) +
                to_double(load(at + 2 * kStride)) * double(view.r22) + double(view.t2);
    alignas(64) double depth[kLanes];
    __builtin_memcpy(depth, &z, sizeof z);
    for (; lanes; lanes &= lanes - 1) {
      const int k = __builtin_ctz(lanes);
      *depths++ = depth[k];
      *out++ = {f[X][k], f[Y][k], f[A][k], f[B][k], f[C][k], f[LogOpacity][k],
                at[11 * kStride + k], at[12 * kStride + k], at[13 * kStride + k],
                f[Tip][k], f[Tilt][k], f[Reach][k], f[Squash][k], int32_t(first_id + i + k),
                uint8_t(f[X0][k]), uint8_t(f[X1][k]), uint8_t(f[Y0][k]), uint8_t(f[Y1][k])};
    }
  }
  return out - splats;
}

// The indices of n depths, least first; equal ones keep their order. Radix sort on the 32 bits below the highest in
// which they differ: positive floating-point numbers order like their bits.
inline void sort_by_depth(const double* depths, int64_t n, Buffer& buffer, uint32_t* order) {
  constexpr int kDigit = 11, kPasses = 3;
  uint64_t *keys = buffer.get<uint64_t>(2 * n), *other = keys + n;
  uint64_t low = ~uint64_t(0), high = 0;
  for (int64_t i = 0; i < n; i++) {
    __builtin_memcpy(&keys[i], &depths[i], 8);
    low = keys[i] < low ? keys[i] : low, high = keys[i] > high ? keys[i] : high;
  }
  const int significant = n ? 64 - __builtin_clzll((high - low) | 1) : 0;
  const int drop = significant > 32 ? significant - 32 : 0;
  uint32_t start[kPasses][1 << kDigit] = {};
  for (int64_t i = 0; i < n; i++) {
    const uint32_t key = uint32_t((keys[i] - low) >> drop);
    keys[i] = uint64_t(key) << 32 | uint64_t(i);
    for (int pass = 0; pass < kPasses; pass++) start[pass][key >> pass * kDigit & ((1 << kDigit) - 1)]++;
  }
  for (int pass = 0; pass < kPasses; pass++) {
    uint32_t before = 0;
    for (uint32_t& here : start[pass]) {
      const uint32_t next = before + here;
      here = before, before = next;
    }
    const int shift = 32 + pass * kDigit;
    for (int64_t i = 0; i < n; i++) other[start[pass][keys[i] >> shift & ((1 << kDigit) - 1)]++] = keys[i];
    uint64_t* swap = keys;
    keys = other, other = swap;
  }
  for (int64_t i = 0; i < n; i++) order[i] = uint32_t(keys[i]);
}

// Gaussians as they come from NumPy, one after the other, to planes.
struct Interleaved {
  const Gaussians& g;
  int64_t count() const { return g.count; }
  void load(int64_t first, int n, float* planes) const {
    split<3>(g.means + 3 * first, n, planes);
    split<4>(g.quats + 4 * first, n, planes + 3 * kStride);
    split<3>(g.scales + 3 * first, n, planes + 7 * kStride);
    split<1>(g.opacities + first, n, planes + 10 * kStride);
    split<3>(g.colors + 3 * first, n, planes + 11 * kStride);
  }
  template <int Width>
  static void split(const float* from, int n, float* planes) {
    for (int i = 0; i < n; i++)
      for (int k = 0; k < Width; k++) planes[k * kStride + i] = from[Width * i + k];
  }
};

template <class Source>
void prepare_from(const Source& source, const Camera& camera, Mode mode, Scratch& scratch, Prepared& out) {
  const View view(camera);
  out.bins_x = (camera.width + kBin - 1) / kBin, out.bins_y = (camera.height + kBin - 1) / kBin;
  Splat* splats = out.splats.get<Splat>(source.count());
  double* depths = out.depths.get<double>(source.count());
  float* planes = scratch.planes.get<float>(kAttributes * kStride);
  int64_t n = 0;
  for (int64_t first = 0; first < source.count(); first += kChunk) {
    const int count = int(source.count() - first < kChunk ? source.count() - first : kChunk);
    source.load(first, count, planes);
    for (int k = 0; k < kAttributes; k++)  // the last vector's spare lanes must not be slow to compute on
      for (int i = count; i < kChunk && i % kLanes; i++) planes[k * kStride + i] = 1.f;
    n += project_chunk(planes, first, count, view, camera, mode, out.bins_x, out.bins_y, splats + n, depths + n);
  }
  out.visible = n;
  uint32_t* order = out.order.get<uint32_t>(n);
  sort_by_depth(depths, n, scratch.keys, order);

  // Count, then fill in depth order: each bin's list is in depth order, too.
  const int bins = out.bins_x * out.bins_y;
  int64_t* start = out.bin_start.get<int64_t>(bins + 1);
  int64_t* cursor = scratch.cursor.get<int64_t>(bins);
  for (int b = 0; b < bins; b++) cursor[b] = 0;
  for (int64_t i = 0; i < n; i++)
    for_each_bin(splats[i], out.bins_x, [=](int b, int touches) { cursor[b] += touches; });
  int64_t before = 0;
  for (int b = 0; b < bins; b++) {
    start[b] = before, before += cursor[b];
    cursor[b] = start[b];
  }
  start[bins] = before;
  uint32_t* list = out.bin_list.get<uint32_t>(before);
  for (int64_t i = 0; i < n; i++)
    for_each_bin(splats[order[i]], out.bins_x, [=](int b, int touches) {
      list[cursor[b]] = order[i];  // where it doesn't touch, the same slot is written again at once, by one that does
      cursor[b] += touches;
    });
}

void prepare(const Gaussians& g, const Camera& camera, Mode mode, Scratch& scratch, Prepared& out) {
  const FlushDenormals flush;
  prepare_from(Interleaved{g}, camera, mode, scratch, out);
}
