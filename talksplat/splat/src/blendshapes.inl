// Avatars: planes of attributes = canonical + sum over k of weight[k] * scale[:, k] * bases[:, k, :], then activation.

// A source of Gaussians for prepare_from, blended a chunk at a time: nothing but the int8 tables is read from memory.
struct Blended {
  const Blendshapes& shapes;
  int active = 0;                             // bases whose weight isn't zero
  int index[kMaxBases];                       // which they are
  float factor[kAttributes][kMaxBases];       // weight * scale

  Blended(const Blendshapes& s, const float* weights) : shapes(s) {
    for (int k = 0; k < s.rank; k++) {
      if (weights[k] == 0.f) continue;
      for (int a = 0; a < kAttributes; a++) factor[a][active] = weights[k] * s.basis_scales[a * s.rank + k];
      index[active++] = k;
    }
  }
  int64_t count() const { return shapes.count; }

  void load(int64_t first, int n, float* planes) const {
    for (int a = 0; a < kAttributes; a++) {
      const float* canonical = shapes.canonical + a * shapes.count + first;
      const int8_t* bases = shapes.bases + int64_t(a) * shapes.rank * shapes.count + first;
      float* out = planes + a * kStride;
      int i = 0;
      for (; i + 4 * kLanes <= n; i += 4 * kLanes) blend_lanes<4>(a, canonical + i, bases + i, out + i);
      for (; i + kLanes <= n; i += kLanes) blend_lanes<1>(a, canonical + i, bases + i, out + i);
      for (; i < n; i++) {
        float x = canonical[i];
        for (int k = 0; k < active; k++) x += factor[a][k] * float(bases[index[k] * shapes.count + i]);
        out[i] = x;
      }
    }
    for (int i = 0; i < n; i += kLanes) {
      for (int a = 7; a < 10; a++) store(planes + a * kStride + i, exp(TALKSPLAT_ISA::load(planes + a * kStride + i)));
      float* opacity = planes + 10 * kStride + i;
      store(opacity, 1.f / (1.f + exp(-TALKSPLAT_ISA::load(opacity))));
    }
  }

  template <int Vectors>
  INLINE void blend_lanes(int a, const float* canonical, const int8_t* bases, float* out) const {
    F x[Vectors];
    UNROLL for (int v = 0; v < Vectors; v++) x[v] = TALKSPLAT_ISA::load(canonical + v * kLanes);
    for (int k = 0; k < active; k++) {
      const int8_t* delta = bases + index[k] * shapes.count;
      UNROLL for (int v = 0; v < Vectors; v++) x[v] += factor[a][k] * from_int8(delta + v * kLanes);
    }
    UNROLL for (int v = 0; v < Vectors; v++) store(out + v * kLanes, x[v]);
  }
};

void blend(const Blendshapes& shapes, const float* weights, Scratch& scratch, const GaussianBuffers& out) {
  const FlushDenormals flush;
  const Blended source(shapes, weights);
  float* planes = scratch.planes.get<float>(kAttributes * kStride);
  const int widths[] = {3, 4, 3, 1, 3};
  float* to[] = {out.means, out.quats, out.scales, out.opacities, out.colors};
  for (int64_t first = 0; first < shapes.count; first += kChunk) {
    const int n = int(shapes.count - first < kChunk ? shapes.count - first : kChunk);
    source.load(first, n, planes);
    for (int a = 0, k = 0; a < 5; a++)
      for (int j = 0; j < widths[a]; j++, k++)
        for (int i = 0; i < n; i++) to[a][(first + i) * widths[a] + j] = planes[k * kStride + i];
  }
}

// The tile, premultiplied, over the plate: out = 255 colour + T plate, to the nearest byte.
inline void composite_tile(const Tile& tile, int image_width, const uint8_t* plate, uint8_t* out) {
  for (int y = 0; y < tile.height; y++) {
    const float* from = tile.planes + y * kBin;
    const size_t at = 3 * (size_t(tile.y + y) * image_width + tile.x);
    alignas(64) float color[3 * kBin], T[3 * kBin];
    for (int x = 0; x < kBin; x++)
      for (int c = 0; c < 3; c++) {
        color[3 * x + c] = from[c * kPlane + x] * 255.f + .5f;
        T[3 * x + c] = 1.f - from[3 * kPlane + x];
      }
    auto write = [&](int bytes) {
      for (int i = 0; i < bytes; i++) {
        float value = color[i] + T[i] * float(plate[at + i]);
        value = value > 0.f ? value : 0.f;  // a NaN too
        value = value < 255.f ? value : 255.f;
        out[at + i] = uint8_t(int(value));
      }
    };
    if (tile.width == kBin) write(3 * kBin);
    else write(3 * tile.width);
  }
}

void draw_onto(const Blendshapes& shapes, const float* weights, const Camera& camera, Mode mode, Scratch& scratch,
               const uint8_t* plate, uint8_t* out) {
  const FlushDenormals flush;
  Prepared& prepared = scratch.prepared;
  prepare_from(Blended(shapes, weights), camera, mode, scratch, prepared);
  const int64_t* start = prepared.bin_start.data<int64_t>();
  float* planes = scratch.tile.get<float>(4 * kPlane);
  if (out != plate) __builtin_memcpy(out, plate, size_t(3) * camera.width * camera.height);
  for (int b = 0; b < prepared.bins_x * prepared.bins_y; b++) {
    const int64_t n = start[b + 1] - start[b];
    if (n == 0) continue;
    const uint32_t* list = prepared.bin_list.data<uint32_t>() + start[b];
    const Splat* splats = gather(prepared.splats.data<Splat>(), list, n, scratch.gathered);
    const Tile tile = tile_at(b, prepared.bins_x, camera, planes);
    draw_bin(splats, n, tile, camera, mode, scratch);
    composite_tile(tile, camera.width, plate, out);
  }
}
