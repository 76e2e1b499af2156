// psq.kernels._native: the levels this CPU can run, and the checks that stand before every kernel.
#include <cstdio>
#include <cstring>

#include "bind.h"

namespace {

struct Entry {
  const PsqKernels* kernels;
  bool runs_here;
};

// Best level first. Levels above v2 ask for the features that name them; v2 is SSE4.2.
size_t list_levels(Entry* entries) {
  size_t count = 0;
#if PSQ_HAS_V2 || PSQ_HAS_V3 || PSQ_HAS_V4
  __builtin_cpu_init();
  const bool v2 = __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
  const bool v3 = v2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
#endif
#if PSQ_HAS_V4
  entries[count++] = {&psq_kernels_v4, v4};
#endif
#if PSQ_HAS_V3
  entries[count++] = {&psq_kernels_v3, v3};
#endif
#if PSQ_HAS_V2
  entries[count++] = {&psq_kernels_v2, v2};
#endif
#if PSQ_HAS_NEON
  entries[count++] = {&psq_kernels_neon, true};
#endif
  return count;
}

nb::tuple runnable_levels() {
  Entry entries[8];
  nb::list names;
  const size_t count = list_levels(entries);
  for (size_t i = 0; i < count; ++i)
    if (entries[i].runs_here) names.append(entries[i].kernels->name);
  return nb::tuple(names);
}

const PsqKernels* find_level(const char* name) {
  Entry entries[8];
  const size_t count = list_levels(entries);
  for (size_t i = 0; i < count; ++i)
    if (entries[i].runs_here && std::strcmp(entries[i].kernels->name, name) == 0) return entries[i].kernels;
  PyErr_Format(PyExc_ValueError, "no level %s here: this build and CPU have %S", name, runnable_levels().ptr());
  throw nb::python_error();
}

bool is_format(const char* format, char code) {
  if (format == nullptr) return code == 'B';
  if (std::strchr("@=<^", format[0]) != nullptr && format[0] != 0) ++format;
  return format[0] == code && format[1] == 0;
}

}  // namespace

View::View(nb::handle object, const char* name, Type type, Access access) : name_(name) {
  const char* expected = type == kF32 ? "float32" : type == kU16 ? "uint16" : "uint8";
  const char* kind = access == kWrite ? "writable, C-contiguous" : "C-contiguous";
  const int flags = PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | (access == kWrite ? PyBUF_WRITABLE : 0);
  if (PyObject_GetBuffer(object.ptr(), &buffer_, flags) != 0) {
    PyErr_Clear();
    PyErr_Format(PyExc_TypeError, "%s must be a %s 1-D %s array, got %s that is not", name, kind, expected,
                 Py_TYPE(object.ptr())->tp_name);
    throw nb::python_error();
  }
  if (buffer_.ndim != 1 || !is_format(buffer_.format, type == kF32 ? 'f' : type == kU16 ? 'H' : 'B')) {
    PyErr_Format(PyExc_TypeError, "%s must be a %s 1-D %s array, got a %d-D %s of item format '%s'", name, kind,
                 expected, buffer_.ndim, Py_TYPE(object.ptr())->tp_name, buffer_.format ? buffer_.format : "B");
    PyBuffer_Release(&buffer_);
    throw nb::python_error();
  }
  numel_ = static_cast<size_t>(buffer_.len) / static_cast<size_t>(buffer_.itemsize);
}

bool View::is_u16(nb::handle object) {
  Py_buffer buffer;
  if (PyObject_GetBuffer(object.ptr(), &buffer, PyBUF_FORMAT | PyBUF_STRIDES) != 0) {
    PyErr_Clear();
    return false;
  }
  const bool is = is_format(buffer.format, 'H');
  PyBuffer_Release(&buffer);
  return is;
}

void View::need(size_t numel, const char* why) const {
  if (numel_ == numel) return;
  PyErr_Format(PyExc_ValueError, "%s has %zu elements, must have %zu: %s", name_, numel_, numel, why);
  throw nb::python_error();
}

NB_MODULE(_native, m) {
  m.def("levels", &runnable_levels, "Names of the levels this build has and this CPU runs, best first.");
  nb::class_<Level> level(m, "Level", "The kernels of one instruction set.");
  level.def("__init__", [](Level* self, const char* name) { new (self) Level{find_level(name)}; }, nb::arg("name"));
  level.def_prop_ro("name", [](const Level& self) { return self.kernels->name; });
  bind_codec(level);
  bind_optim(level);
  bind_server(level);
  bind_worker(level);
}
