// Structural similarity (Wang, Bovik, Sheikh, Simoncelli 2004): Gaussian windows of 11 x 11 pixels, sigma 1.5, wherever
// one fits into the image. Windows are separable, and channels lie next to each other, so a row of W pixels and C
// channels is filtered as one row of W * C floats with taps C apart.

struct SsimWindow {
  float w[kSsimWindow];
  SsimWindow() {
    float total = 0;
    for (int i = 0; i < kSsimWindow; i++) {
      const float d = float(i - kSsimWindow / 2) / 1.5f;
      total += w[i] = __builtin_expf(-.5f * d * d);
    }
    for (float& x : w) x /= total;
  }
};

// out[i] = sum over k of w[k] * in[i + k * stride], i < n; reads and writes up to kLanes - 1 floats more.
INLINE void filter_row(const float* w, const float* in, int64_t stride, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += kLanes) {
    F x = w[0] * load(in + i);
    UNROLL for (int k = 1; k < kSsimWindow; k++) x += w[k] * load(in + i + k * stride);
    store(out + i, x);
  }
}

double ssim(const float* a, const float* b, int height, int width, int channels, float data_range, Scratch& scratch,
            float* grad) {
  const FlushDenormals flush;
  const SsimWindow window;
  const float *w = window.w, c1 = .01f * .01f * data_range * data_range, c2 = .03f * .03f * data_range * data_range;
  const int64_t row = int64_t(width) * channels, margin = int64_t(kSsimWindow - 1) * channels, valid = row - margin;
  const int rows = height - (kSsimWindow - 1);
  const int64_t stride = (row + margin + 2 * kLanes) / kLanes * kLanes;  // of every buffer's row
  const float scale = 1.f / (float(rows) * float(valid));

  // Filtered along the row, a ring of kSsimWindow rows: means of a and b, of a^2 + b^2, of ab.
  enum { MeanA, MeanB, Squares, Product, Maps };
  float* ring = scratch.ring.get<float>((kSsimWindow * Maps + Maps) * stride);
  float* line = ring + kSsimWindow * Maps * stride;  // the row before it is filtered
  // Gradients with respect to MeanA, Squares and Product, each row with a margin of zeros on its left and right.
  float* maps = grad ? scratch.maps.get<float>(3 * rows * stride) : nullptr;

  double total = 0;
  for (int64_t i = 0; i < Maps * stride; i++) line[i] = 0;
  for (int y = 0; y < height; y++) {
    for (int64_t i = 0; i < row; i++) {
      const float p = a[y * row + i], q = b[y * row + i];
      line[i] = p, line[stride + i] = q, line[2 * stride + i] = p * p + q * q, line[3 * stride + i] = p * q;
    }
    for (int m = 0; m < Maps; m++)
      filter_row(w, line + m * stride, channels, valid, ring + (m * kSsimWindow + y % kSsimWindow) * stride);
    const int top = y - (kSsimWindow - 1);
    if (top < 0) continue;

    const float* at[kSsimWindow];  // the window's rows of MeanA; the other maps lie kSsimWindow * stride further on
    for (int k = 0; k < kSsimWindow; k++) at[k] = ring + (top + k) % kSsimWindow * stride;
    F row_total = set(0);
    for (int64_t i = 0; i < valid; i += kLanes) {
      F v[Maps];
      UNROLL for (int m = 0; m < Maps; m++) {
        v[m] = w[0] * load(at[0] + m * kSsimWindow * stride + i);
        UNROLL for (int k = 1; k < kSsimWindow; k++) v[m] += w[k] * load(at[k] + m * kSsimWindow * stride + i);
      }
      const F ma = v[MeanA], mb = v[MeanB], mean_squares = ma * ma + mb * mb, mean_product = ma * mb;
      const F n1 = 2.f * mean_product + c1, n2 = 2.f * (v[Product] - mean_product) + c2;
      const F d1 = mean_squares + c1, d2 = v[Squares] - mean_squares + c2;
      const F inside = keep(gt(set(float(valid)), to_float(iota() + int32_t(i))), set(1));
      const F inverse = inside / (d1 * d2), value = n1 * n2 * inverse;
      row_total += value;
      if (!grad) continue;
      float* to = maps + top * stride + margin + i;
      store(to, scale * (2.f * mb * (n2 - n1) * inverse - 2.f * ma * value * (d2 - d1) / (d1 * d2)));
      store(to + rows * stride, -scale * value / d2);
      store(to + 2 * rows * stride, 2.f * scale * n1 * inverse);
    }
    total += sum(row_total);
    for (int m = 0; grad && m < 3; m++) {
      float* left = maps + (m * rows + top) * stride;
      for (int64_t i = 0; i < margin; i++) left[i] = 0;
      for (int64_t i = margin + (valid + kLanes - 1) / kLanes * kLanes; i < stride; i++) left[i] = 0;
    }
  }
  if (!grad) return total * (1. / (double(rows) * double(valid)));

  // The filters transposed: gather from every window that a pixel was part of.
  for (int y = 0; y < height; y++) {
    const int first = y - (kSsimWindow - 1) > 0 ? y - (kSsimWindow - 1) : 0, last = y < rows - 1 ? y : rows - 1;
    for (int m = 0; m < 3; m++) {
      const float* map = maps + m * rows * stride;
      for (int64_t i = 0; i < stride; i += kLanes) {
        F x = set(0);
        for (int r = first; r <= last; r++) x += w[y - r] * load(map + r * stride + i);
        store(line + i, x);
      }
      filter_row(w, line, channels, row, ring + m * stride);
    }
    for (int64_t i = 0; i < row; i++)
      grad[y * row + i] = ring[i] + 2.f * a[y * row + i] * ring[stride + i] + b[y * row + i] * ring[2 * stride + i];
  }
  return total * (1. / (double(rows) * double(valid)));
}
