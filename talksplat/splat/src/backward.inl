// GaussianBuffers of the exact mode, front to back once more.
//
// For the k-th Gaussian of a pixel, with g the gradient of its colour and h that of its alpha,
//   dLoss/dalpha_k = T_k (color_k . g) - rest_k / (1 - alpha_k),
// where rest_k is everything behind it: sum over j > k of weight_j (color_j . g), plus T_end (background . g - h).
// From the finished image, rest_0 = color . g - T_end h (the image holds the background already), and each Gaussian
// takes its own part away in passing. So the forward pass needs to record nothing.
//
// Per Gaussian there are nine sums over pixels: w = alpha dLoss/dalpha, its moments dx, dy, dx^2, dx dy, dy^2 about the
// centre, and the gradient of the colour. A sum stays spread over the lanes until its bin is done.

constexpr int kSums = 9;

struct Backward : Quad {
  Pixels y, rest;
  Colors grad;
  float* sums;  // [splats of the bin, kSums, kLanes]

  // planes: at this quad, of the colour's gradient and of rest_0
  INLINE Backward(int x, int y0, const Camera& camera, const float* planes, float* sums)
      : Quad(x, y0, camera), sums(sums) {
    UNROLL for (int v = 0; v < kVectors; v++, planes += kRows * kBin) {
      y[v] = lane_y(v) + (float(y0) + .5f);
      grad.red[v] = load_rows(planes), grad.green[v] = load_rows(planes + kPlane);
      grad.blue[v] = load_rows(planes + 2 * kPlane), rest[v] = load_rows(planes + 3 * kPlane);
    }
  }
  INLINE void blend(const Row& row) {
    const Splat& s = row.splat;
    const F dx = px - s.x;
    float* at = sums + s.id * (kSums * kLanes);
    F total[kSums];
    UNROLL for (int k = 0; k < kSums; k++) total[k] = load(at + k * kLanes);
    UNROLL for (int v = 0; v < kVectors; v++) {
      const F dy = y[v] - s.y, q = row.exponent(v, dx);
      const F unclamped = exp2(q, kExp2);
      const F a = keep(ge(q, set(-kLog2Of255)), min(unclamped, set(kMaxAlpha)));
      const F next = minus_product(T[v], a, T[v]);
      const M blended = gt(next, set(kMinT));
      const F weight = keep(blended, a * T[v]);
      const F color = grad.red[v] * s.red + grad.green[v] * s.green + grad.blue[v] * s.blue;
      rest[v] -= weight * color;
      const F grad_alpha = T[v] * color - rest[v] * reciprocal(1.f - a);
      const F w = keep(both(blended, ge(set(kMaxAlpha), unclamped)), a * grad_alpha);
      const F wx = w * dx, wy = w * dy;
      total[0] += w, total[1] += wx, total[2] += wy, total[3] += wx * dx, total[4] += wx * dy, total[5] += wy * dy;
      total[6] += weight * grad.red[v], total[7] += weight * grad.green[v], total[8] += weight * grad.blue[v];
      T[v] = next;
    }
    UNROLL for (int k = 0; k < kSums; k++) store(at + k * kLanes, total[k]);
  }
};

// The planes that Backward starts from.
inline void load_gradients(const Tile& tile, const Camera& camera, const float* colors, const float* alphas,
                           const float* grad_colors, const float* grad_alphas) {
  for (int y = 0; y < tile.height; y++) {
    const size_t at = size_t(tile.y + y) * camera.width + tile.x;
    const float *color = colors + 3 * at, *grad = grad_colors + 3 * at;
    float* to = tile.planes + y * kBin;
    auto read = [&](int width) {
      for (int x = 0; x < width; x++) {
        const float r = grad[3 * x], g = grad[3 * x + 1], b = grad[3 * x + 2];
        to[x] = r, to[kPlane + x] = g, to[2 * kPlane + x] = b;
        to[3 * kPlane + x] = color[3 * x] * r + color[3 * x + 1] * g + color[3 * x + 2] * b -
                             (1.f - alphas[at + x]) * grad_alphas[at + x];
      }
    };
    tile.width == kBin ? read(kBin) : read(tile.width);
  }
}

// Sums of kLanes splats (planes of kStride, behind the attributes' planes) to gradients of the attributes, in place of
// the latter.
INLINE void project_backward(const View& v, float* planes) {
  const Projection p(v, planes);
  auto plane = [planes](int k) { return load(planes + k * kStride); };
  auto sum = [planes](int k) { return load(planes + (kAttributes + k) * kStride); };
  auto put = [planes](int k, F x) { store(planes + k * kStride, x); };
  const F s0 = plane(7), s1 = plane(8), s2 = plane(9);

  // To the centre, and to the conic (the covariance's inverse) and through it to the covariance.
  const F inverse = 1.f / p.det, qa = p.c11 * inverse, qb = -(p.c01 * inverse), qc = p.c00 * inverse;
  const F du = qa * sum(1) + qb * sum(2), dv = qb * sum(1) + qc * sum(2);
  const F g00 = sum(3) * .5f, g01 = sum(4) * .5f, g11 = sum(5) * .5f;
  const F h00 = qa * g00 + qb * g01, h01 = qa * g01 + qb * g11;
  const F h10 = qb * g00 + qc * g01, h11 = qb * g01 + qc * g11;
  const F d00 = h00 * qa + h01 * qb, d01 = h00 * qb + h01 * qc, d11 = h10 * qb + h11 * qc;

  // The covariance is P P^T with P = E S: to P, to the scales, to E.
  const F p00 = p.e00 * s0, p01 = p.e01 * s1, p02 = p.e02 * s2;
  const F p10 = p.e10 * s0, p11 = p.e11 * s1, p12 = p.e12 * s2;
  F a00 = 2.f * (d00 * p00 + d01 * p10), a10 = 2.f * (d01 * p00 + d11 * p10);
  F a01 = 2.f * (d00 * p01 + d01 * p11), a11 = 2.f * (d01 * p01 + d11 * p11);
  F a02 = 2.f * (d00 * p02 + d01 * p12), a12 = 2.f * (d01 * p02 + d11 * p12);
  put(7, p.e00 * a00 + p.e10 * a10);
  put(8, p.e01 * a01 + p.e11 * a11);
  put(9, p.e02 * a02 + p.e12 * a12);
  a00 *= s0, a10 *= s0, a01 *= s1, a11 *= s1, a02 *= s2, a12 *= s2;

  // E = W R: to the rotation R, and through its quaternion's normalisation.
  const F R00 = p.w00 * a00 + p.w10 * a10, R01 = p.w00 * a01 + p.w10 * a11, R02 = p.w00 * a02 + p.w10 * a12;
  const F R10 = p.w01 * a00 + p.w11 * a10, R11 = p.w01 * a01 + p.w11 * a11, R12 = p.w01 * a02 + p.w11 * a12;
  const F R20 = p.w02 * a00 + p.w12 * a10, R21 = p.w02 * a01 + p.w12 * a11, R22 = p.w02 * a02 + p.w12 * a12;
  const F w = p.qw, x = p.qx, y = p.qy, z = p.qz;
  const F gw = 2.f * (x * (R21 - R12) + y * (R02 - R20) + z * (R10 - R01));
  const F gx = 2.f * (w * (R21 - R12) + y * (R01 + R10) + z * (R02 + R20) - 2.f * x * (R11 + R22));
  const F gy = 2.f * (w * (R02 - R20) + x * (R01 + R10) + z * (R12 + R21) - 2.f * y * (R00 + R22));
  const F gz = 2.f * (w * (R10 - R01) + x * (R02 + R20) + y * (R12 + R21) - 2.f * z * (R00 + R11));
  const F along = w * gw + x * gx + y * gy + z * gz;
  put(3, (gw - w * along) * p.iq), put(4, (gx - x * along) * p.iq);
  put(5, (gy - y * along) * p.iq), put(6, (gz - z * along) * p.iq);

  // To W, and to the four entries of the Jacobian.
  const F W00 = a00 * p.m00 + a01 * p.m01 + a02 * p.m02, W10 = a10 * p.m00 + a11 * p.m01 + a12 * p.m02;
  const F W01 = a00 * p.m10 + a01 * p.m11 + a02 * p.m12, W11 = a10 * p.m10 + a11 * p.m11 + a12 * p.m12;
  const F W02 = a00 * p.m20 + a01 * p.m21 + a02 * p.m22, W12 = a10 * p.m20 + a11 * p.m21 + a12 * p.m22;
  const F jx = W00 * v.r00 + W01 * v.r01 + W02 * v.r02, jxz = W00 * v.r20 + W01 * v.r21 + W02 * v.r22;
  const F jy = W10 * v.r10 + W11 * v.r11 + W12 * v.r12, jyz = W10 * v.r20 + W11 * v.r21 + W12 * v.r22;

  // To the centre in camera space. Where x/z was clamped it doesn't follow the centre.
  auto follows = [](F ratio, Range limit) {
    return keep(both(ge(ratio, set(limit.low)), ge(set(limit.high), ratio)), set(1));
  };
  const F free_x = follows(p.tx * p.iz, v.limit_x), free_y = follows(p.ty * p.iz, v.limit_y), iz2 = p.iz * p.iz;
  const F tx = v.fx * (du * p.iz - free_x * jxz * iz2), ty = v.fy * (dv * p.iz - free_y * jyz * iz2);
  const F tz = iz2 * (v.fx * ((1.f + free_x) * jxz * p.ux - du * p.tx - jx) +
                      v.fy * ((1.f + free_y) * jyz * p.uy - dv * p.ty - jy));
  put(0, v.r00 * tx + v.r10 * ty + v.r20 * tz);
  put(1, v.r01 * tx + v.r11 * ty + v.r21 * tz);
  put(2, v.r02 * tx + v.r12 * ty + v.r22 * tz);
  put(10, sum(0) / plane(10));
  put(11, sum(6)), put(12, sum(7)), put(13, sum(8));
}

// Rows of an array to planes, and back.
template <int Width, class Index>
INLINE void take(const float* from, int count, Index index, float* planes) {
  for (int i = 0; i < count; i++)
    UNROLL for (int k = 0; k < Width; k++) planes[k * kStride + i] = from[index(i) * Width + k];
}
template <int Width, class Index>
INLINE void give(float* to, int count, Index index, const float* planes) {
  for (int i = 0; i < count; i++)
    UNROLL for (int k = 0; k < Width; k++) to[index(i) * Width + k] = planes[k * kStride + i];
}

void backward(const Gaussians& g, const Prepared& prepared, const Camera& camera, Scratch& scratch, const float* colors,
              const float* alphas, const float* grad_colors, const float* grad_alphas, const GaussianBuffers& out) {
  const FlushDenormals flush;
  const Splat* splats = prepared.splats.data<Splat>();
  const int64_t* start = prepared.bin_start.data<int64_t>();
  const int64_t visible = prepared.visible;
  float* moments = scratch.moments.get<float>(visible * kSums);
  __builtin_memset(moments, 0, visible * kSums * sizeof(float));
  float* planes = scratch.tile.get<float>(4 * kPlane);

  for (int b = 0; b < prepared.bins_x * prepared.bins_y; b++) {
    const int64_t n = start[b + 1] - start[b];
    if (n == 0) continue;
    const uint32_t* list = prepared.bin_list.data<uint32_t>() + start[b];
    const Splat* here = gather(splats, list, n, scratch.gathered);
    const Tile tile = tile_at(b, prepared.bins_x, camera, planes);
    load_gradients(tile, camera, colors, alphas, grad_colors, grad_alphas);
    float* sums = scratch.sums.get<float>(n * kSums * kLanes);
    __builtin_memset(sums, 0, n * kSums * kLanes * sizeof(float));
    walk_bin(
        here, n, tile, scratch,
        [&](int x, int y) { return Backward(tile.x + x, tile.y + y, camera, planes + y * kBin + x, sums); },
        [](const Backward&, int, int) {});
    for (int64_t i = 0; i < n; i++)
      for (int k = 0; k < kSums; k++) moments[list[i] * kSums + k] += sum(load(sums + (i * kSums + k) * kLanes));
  }

  __builtin_memset(out.means, 0, g.count * 3 * sizeof(float));
  __builtin_memset(out.quats, 0, g.count * 4 * sizeof(float));
  __builtin_memset(out.scales, 0, g.count * 3 * sizeof(float));
  __builtin_memset(out.opacities, 0, g.count * sizeof(float));
  __builtin_memset(out.colors, 0, g.count * 3 * sizeof(float));
  const View view(camera);
  planes = scratch.planes.get<float>((kAttributes + kSums) * kStride);
  for (int64_t first = 0; first < visible; first += kChunk) {
    const int count = int(visible - first < kChunk ? visible - first : kChunk);
    auto id = [=](int i) { return int64_t(splats[first + i].id); };
    take<3>(g.means, count, id, planes), take<4>(g.quats, count, id, planes + 3 * kStride);
    take<3>(g.scales, count, id, planes + 7 * kStride), take<1>(g.opacities, count, id, planes + 10 * kStride);
    take<3>(g.colors, count, id, planes + 11 * kStride);
    take<kSums>(moments, count, [=](int i) { return first + i; }, planes + kAttributes * kStride);
    for (int k = 0; k < kAttributes + kSums; k++)
      for (int i = count; i % kLanes; i++) planes[k * kStride + i] = 1.f;
    for (int i = 0; i < count; i += kLanes) project_backward(view, planes + i);
    give<3>(out.means, count, id, planes), give<4>(out.quats, count, id, planes + 3 * kStride);
    give<3>(out.scales, count, id, planes + 7 * kStride), give<1>(out.opacities, count, id, planes + 10 * kStride);
    give<3>(out.colors, count, id, planes + 11 * kStride);
  }
}
