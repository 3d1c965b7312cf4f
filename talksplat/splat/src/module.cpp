// The Python binding. Shapes and dtypes were checked in Python, where the messages are written; nanobind checks them
// once more. Every function runs its frames on the pool without the GIL.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "pool.h"
#include "types.h"

namespace nb = nanobind;
using namespace talksplat;

namespace {

using Floats2 = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Floats3 = nb::ndarray<const float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using OutFloats2 = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using OutFloats3 = nb::ndarray<float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using OutFloats4 = nb::ndarray<float, nb::ndim<4>, nb::c_contig, nb::device::cpu>;

const Kernels& kernels_for(const std::string& isa) {
  if (const Kernels* k = find_kernels(isa.c_str())) return *k;
  throw std::invalid_argument("no kernels for the instruction set " + isa);
}

// Scratch memory is handed from frame to frame: as many pieces exist as frames were ever drawn at once.
class ScratchLease {
 public:
  ScratchLease() {
    std::lock_guard lock(mutex());
    if (!idle().empty()) scratch_ = std::move(idle().back()), idle().pop_back();
    if (!scratch_) scratch_ = std::make_unique<Scratch>();
  }
  ~ScratchLease() {
    std::lock_guard lock(mutex());
    idle().push_back(std::move(scratch_));
  }
  Scratch& operator*() { return *scratch_; }

 private:
  static std::mutex& mutex() {
    static std::mutex m;
    return m;
  }
  static std::vector<std::unique_ptr<Scratch>>& idle() {
    static auto* pieces = new std::vector<std::unique_ptr<Scratch>>;  // outlives the pool's detached threads
    return *pieces;
  }
  std::unique_ptr<Scratch> scratch_;
};

// Gaussians and cameras of a batch. A leading dimension of 1 is shared by all frames.
struct Scene {
  Floats3 means, quats, scales;
  Floats2 opacities;
  Floats3 colors, viewmats, Ks;
  Floats2 backgrounds;
  int width, height;

  Gaussians gaussians(size_t frame) const {
    return {int64_t(means.shape(1)), at(means, frame), at(quats, frame), at(scales, frame), at(opacities, frame),
            at(colors, frame)};
  }
  Camera camera(size_t frame) const {
    const float* b = at(backgrounds, frame);
    return {width, height, at(viewmats, frame), at(Ks, frame), {b[0], b[1], b[2]}};
  }
  template <class A>
  static const float* at(const A& a, size_t frame) {
    return a.shape(0) == 1 ? a.data() : a.data() + frame * (a.size() / a.shape(0));
  }
};

Mode mode_of(bool fast) { return fast ? Mode::fast : Mode::exact; }

void render(const Scene& scene, bool fast, const std::string& isa, int threads, OutFloats4 colors, OutFloats3 alphas) {
  const Kernels& kernels = kernels_for(isa);
  const size_t pixels = size_t(scene.width) * scene.height;
  nb::gil_scoped_release release;
  parallel_for(int(colors.shape(0)), threads, [&](int f) {
    ScratchLease scratch;
    const Camera camera = scene.camera(f);
    Prepared& prepared = (*scratch).prepared;
    kernels.prepare(scene.gaussians(f), camera, mode_of(fast), *scratch, prepared);
    kernels.draw(prepared, camera, mode_of(fast), *scratch, colors.data() + 3 * pixels * f, alphas.data() + pixels * f);
  });
}

// A batch rendered in exact mode, with what its gradients need.
class Tape {
 public:
  Tape(const Scene& scene, const std::string& isa, int threads, OutFloats4 colors, OutFloats3 alphas)
      : scene_(scene), kernels_(kernels_for(isa)), threads_(threads), colors_(colors), alphas_(alphas),
        frames_(int(colors.shape(0))), prepared_(new Prepared[colors.shape(0)]) {
    nb::gil_scoped_release release;
    parallel_for(frames_, threads_, [&](int f) {
      ScratchLease scratch;
      const Camera camera = scene_.camera(f);
      kernels_.prepare(scene_.gaussians(f), camera, Mode::exact, *scratch, prepared_[f]);
      kernels_.draw(prepared_[f], camera, Mode::exact, *scratch, colors_.data() + 3 * pixels() * f,
                    alphas_.data() + pixels() * f);
    });
  }

  void backward(nb::ndarray<const float, nb::ndim<4>, nb::c_contig, nb::device::cpu> grad_colors, Floats3 grad_alphas,
                OutFloats3 means, OutFloats3 quats, OutFloats3 scales, OutFloats2 opacities, OutFloats3 colors) const {
    const size_t n = scene_.means.shape(1);
    nb::gil_scoped_release release;
    parallel_for(frames_, threads_, [&](int f) {
      ScratchLease scratch;
      const GaussianBuffers out{means.data() + 3 * n * f, quats.data() + 4 * n * f, scales.data() + 3 * n * f,
                          opacities.data() + n * f, colors.data() + 3 * n * f};
      const size_t pixel = pixels() * f;
      kernels_.backward(scene_.gaussians(f), prepared_[f], scene_.camera(f), *scratch, colors_.data() + 3 * pixel,
                        alphas_.data() + pixel, grad_colors.data() + 3 * pixel, grad_alphas.data() + pixel, out);
    });
  }

 private:
  size_t pixels() const { return size_t(scene_.width) * scene_.height; }

  Scene scene_;
  const Kernels& kernels_;
  int threads_;
  OutFloats4 colors_;
  OutFloats3 alphas_;
  int frames_;
  std::unique_ptr<Prepared[]> prepared_;
};

// The scene's own Gaussians stand still; those given to draw() move.
class DirtyRenderer {
 public:
  DirtyRenderer(const Scene& still, bool fast, const std::string& isa)
      : still_(still), kernels_(kernels_for(isa)), mode_(mode_of(fast)) {
    nb::gil_scoped_release release;
    kernels_.prepare(still_.gaussians(0), still_.camera(0), mode_, scratch_, prepared_);
    touched_.assign(size_t(prepared_.bins_x) * prepared_.bins_y, 1);  // the first frame draws everything
  }

  int64_t draw(Floats2 means, Floats2 quats, Floats2 scales,
               nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu> opacities, Floats2 colors,
               OutFloats3 out_colors, OutFloats2 out_alphas) {
    const Gaussians moving{int64_t(means.shape(0)), means.data(), quats.data(), scales.data(), opacities.data(),
                           colors.data()};
    const Camera camera = still_.camera(0);
    nb::gil_scoped_release release;
    std::lock_guard lock(mutex_);
    kernels_.prepare(moving, camera, mode_, scratch_, scratch_.prepared);
    return kernels_.draw_dirty(prepared_, scratch_.prepared, camera, mode_, scratch_, touched_.data(),
                               out_colors.data(), out_alphas.data());
  }

 private:
  Scene still_;
  const Kernels& kernels_;
  Mode mode_;
  Scratch scratch_;
  Prepared prepared_;
  std::vector<uint8_t> touched_;
  std::mutex mutex_;
};

struct Shapes {
  nb::ndarray<const float, nb::shape<14, -1>, nb::c_contig, nb::device::cpu> canonical;
  nb::ndarray<const int8_t, nb::shape<14, -1, -1>, nb::c_contig, nb::device::cpu> bases;
  nb::ndarray<const float, nb::shape<14, -1>, nb::c_contig, nb::device::cpu> basis_scales;

  Blendshapes view() const {
    return {int64_t(canonical.shape(1)), int(basis_scales.shape(1)), canonical.data(), bases.data(),
            basis_scales.data()};
  }
};

void blend(const Shapes& shapes, Floats2 weights, const std::string& isa, int threads, OutFloats3 means,
           OutFloats3 quats, OutFloats3 scales, OutFloats2 opacities, OutFloats3 colors) {
  const Kernels& kernels = kernels_for(isa);
  const Blendshapes view = shapes.view();
  const size_t n = view.count;
  nb::gil_scoped_release release;
  parallel_for(int(weights.shape(0)), threads, [&](int f) {
    ScratchLease scratch;
    kernels.blend(view, weights.data() + view.rank * f, *scratch,
                  {means.data() + 3 * n * f, quats.data() + 4 * n * f, scales.data() + 3 * n * f,
                   opacities.data() + n * f, colors.data() + 3 * n * f});
  });
}

struct Job {
  Shapes shapes;
  nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu> weights;
  nb::ndarray<const float, nb::shape<4, 4>, nb::c_contig, nb::device::cpu> viewmat;
  nb::ndarray<const float, nb::shape<3, 3>, nb::c_contig, nb::device::cpu> K;
  nb::ndarray<const uint8_t, nb::shape<-1, -1, 3>, nb::c_contig, nb::device::cpu> plate;
  nb::ndarray<uint8_t, nb::shape<-1, -1, 3>, nb::c_contig, nb::device::cpu> out;
};

void render_onto(const std::vector<const Job*>& jobs, bool fast, const std::string& isa, int threads) {
  const Kernels& kernels = kernels_for(isa);
  nb::gil_scoped_release release;
  parallel_for(int(jobs.size()), threads, [&](int f) {
    const Job& job = *jobs[f];
    ScratchLease scratch;
    const Camera camera{int(job.plate.shape(1)), int(job.plate.shape(0)), job.viewmat.data(), job.K.data(), {}};
    kernels.draw_onto(job.shapes.view(), job.weights.data(), camera, mode_of(fast), *scratch, job.plate.data(),
                      job.out.data());
  });
}

using Images = nb::ndarray<const float, nb::ndim<4>, nb::c_contig, nb::device::cpu>;

// The mean SSIM of each pair of images; with_gradient fills grad, else it is left alone.
std::vector<double> ssim(Images a, Images b, float data_range, const std::string& isa, int threads, bool with_gradient,
                         OutFloats4 grad) {
  const Kernels& kernels = kernels_for(isa);
  std::vector<double> means(a.shape(0));
  const size_t size = a.shape(1) * a.shape(2) * a.shape(3);
  nb::gil_scoped_release release;
  parallel_for(int(means.size()), threads, [&](int f) {
    ScratchLease scratch;
    means[f] = kernels.ssim(a.data() + size * f, b.data() + size * f, int(a.shape(1)), int(a.shape(2)), int(a.shape(3)),
                            data_range, *scratch, with_gradient ? grad.data() + size * f : nullptr);
  });
  return means;
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const char* const* name = available_isas(); *name; name++) names.push_back(*name);
  return names;
}

}  // namespace

NB_MODULE(_core, m) {
  nb::set_leak_warnings(false);  // at exit, autograd graphs may still hold a tape
  m.attr("MAX_SIZE") = kMaxSize;
  m.attr("ATTRIBUTES") = kAttributes;
  m.attr("MAX_BASES") = kMaxBases;
  m.attr("SSIM_WINDOW") = kSsimWindow;
  m.def("isas", &isas);
  m.def("usable_cores", &usable_cores);

  nb::class_<Scene>(m, "Scene")
      .def("__init__", [](Scene* self, Floats3 means, Floats3 quats, Floats3 scales, Floats2 opacities, Floats3 colors,
                          Floats3 viewmats, Floats3 Ks, Floats2 backgrounds, int width, int height) {
        new (self) Scene{means, quats, scales, opacities, colors, viewmats, Ks, backgrounds, width, height};
      });
  m.def("render", &render);
  nb::class_<Tape>(m, "Tape")
      .def(nb::init<const Scene&, const std::string&, int, OutFloats4, OutFloats3>())
      .def("backward", &Tape::backward);
  nb::class_<DirtyRenderer>(m, "DirtyRenderer")
      .def(nb::init<const Scene&, bool, const std::string&>())
      .def("draw", &DirtyRenderer::draw);

  nb::class_<Shapes>(m, "Shapes")
      .def("__init__", [](Shapes* self, decltype(Shapes::canonical) canonical, decltype(Shapes::bases) bases,
                          decltype(Shapes::basis_scales) basis_scales) {
        new (self) Shapes{canonical, bases, basis_scales};
      });
  m.def("blend", &blend);
  nb::class_<Job>(m, "Job")
      .def("__init__", [](Job* self, const Shapes& shapes, decltype(Job::weights) weights,
                          decltype(Job::viewmat) viewmat, decltype(Job::K) K, decltype(Job::plate) plate,
                          decltype(Job::out) out) {
        new (self) Job{shapes, weights, viewmat, K, plate, out};
      });
  m.def("render_onto", &render_onto);
  m.def("ssim", &ssim);
}
