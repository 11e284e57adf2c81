// The straight way of the recurrent modules: a streaming step in one call from Python. Of such a step, what lies
// between the caller and the kernel can take longer than the kernel. So a plain call (no gradient, no switch, nothing
// traced, weights packed by a call before and not written since) is recognised here and given to torch's dispatcher at
// once. Whatever is not as expected is None, and goes the general way, which says what is wrong.
#include "straight.h"

#include <pybind11/pybind11.h>

#include <cstring>
#include <optional>
#include <string>

#include "boxing.h"
#include "cpu/dispatch.h"
#include "tensor.h"

namespace py = pybind11;

namespace handtuned {
namespace {

// ---- Python's objects ---------------------------------------------------------------------------------------------

// Owns a reference. Errors of what made it are dropped: it is empty then.
class Ref {
 public:
  explicit Ref(PyObject* object) : object_(object) {
    if (!object) PyErr_Clear();
  }
  Ref(const Ref&) = delete;
  ~Ref() { Py_XDECREF(object_); }
  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }
  explicit operator bool() const { return object_; }

 private:
  PyObject* object_;
};

PyObject* kept_for_ever(py::object object) { return object.release().ptr(); }

// What a call asks of torch and of this package.
struct World {
  PyObject *tensor_type, *handle_of, *tensors_of;
  PyObject* switches[5];  // functions that say whether somebody watches calls, or changes them
  PyObject *forward_ad, *backends, *kept, *plain;

  static PyObject* of(const char* module, const char* name) {
    return kept_for_ever(py::module_::import(module).attr(name));
  }
  World()
      : tensor_type(of("torch", "Tensor")),
        handle_of(of("torch._C._aoti", "unsafe_alloc_void_ptr_from_tensor")),
        tensors_of(of("torch._C._aoti", "alloc_tensors_by_stealing_from_void_ptrs")),
        switches{of("torch._C", "_is_any_autocast_enabled"), of("torch._C", "_are_functorch_transforms_active"),
                 of("torch._C", "_is_tracing"), of("torch._C", "_len_torch_function_stack"),
                 of("torch._C", "_len_torch_dispatch_stack")},
        forward_ad(of("torch.autograd.forward_ad", "__dict__")),
        backends(of("handtuned.backends", "__dict__")),
        kept(kept_for_ever(py::module_::import("handtuned.nn.packing").attr("_kept").attr("data"))),
        plain(of("handtuned.nn.functional.variants", "PLAIN")) {}
};
// nullptr with a torch that has no such things. Not a static of C++: a thread in its initialiser may give up the GIL to
// one that then waits for the initialiser.
const World* world() {
  static const World* found = nullptr;
  static bool looked = false;
  if (!looked) {
    try {
      const World* made = new World;  // twice where two threads look at once: all of it is Python's own
      found = made;
    } catch (const py::error_already_set&) {
    }
    looked = true;
  }
  return found;
}

// Attributes of a module, by names that Python knows by their addresses.
struct Names {
  static PyObject* of(const char* name) { return PyUnicode_InternFromString(name); }
  PyObject *variant = of("variant"), *keep_packed = of("keep_packed"), *parameters = of("_parameters");
  PyObject *hidden_size = of("hidden_size"), *input_size = of("input_size"), *proj_size = of("proj_size");
  PyObject *num_layers = of("num_layers"), *bidirectional = of("bidirectional"), *batch_first = of("batch_first");
  PyObject *training = of("training"), *dropout = of("dropout");
  PyObject *stack = of("stack"), *marks = of("marks"), *version = of("_version");
  PyObject *plain = of("plain"), *current_level = of("_current_level");
};
const Names& names() {
  static const Names* found = new Names;
  return *found;
}

int64_t number(PyObject* object) {  // -1: none
  const int64_t n = object && PyLong_Check(object) ? PyLong_AsLongLong(object) : -1;
  if (n == -1) PyErr_Clear();
  return n;
}
int64_t number(PyObject* object, PyObject* name) { return number(Ref(PyObject_GetAttr(object, name)).get()); }
bool is_true(PyObject* object, PyObject* name) {
  const Ref found(PyObject_GetAttr(object, name));
  return found && PyObject_IsTrue(found.get()) == 1;
}

Tensor handle_of(PyObject* tensor) {  // of nullptr where there is none
  const Ref capsule(PyObject_CallOneArg(world()->handle_of, tensor));
  return Tensor(static_cast<AtenTensorHandle>(capsule ? PyCapsule_GetPointer(capsule.get(), nullptr) : nullptr));
}

// ---- what must hold -----------------------------------------------------------------------------------------------

bool nobody_watches() {
  const World& w = *world();
  if (aoti_torch_grad_mode_is_enabled()) return false;
  if (PyDict_GetItem(w.backends, names().plain) != Py_True) return false;
  PyObject* level = PyDict_GetItem(w.forward_ad, names().current_level);
  if (!level || !PyLong_Check(level) || PyLong_AsLong(level) >= 0) return false;
  for (PyObject* asked : w.switches) {
    const Ref answer(PyObject_CallNoArgs(asked));
    if (!answer || PyObject_IsTrue(answer.get())) return false;
  }
  return true;
}

// What nn/packing.py keeps of a module's weights, borrowed, if it was made of these very tensors (the first ones of the
// module's parameters, of this dtype), for this instruction set, and nothing was written since; else nullptr.
PyObject* packed_of(PyObject* module, ScalarType dtype) {
  const Names& n = names();
  const Ref key(PyWeakref_NewRef(module, nullptr));
  PyObject* mine = key ? PyDict_GetItem(world()->kept, key.get()) : nullptr;
  PyObject* found = mine ? PyDict_GetItem(mine, n.stack) : nullptr;
  if (!found || !is_true(module, n.keep_packed)) return nullptr;
  const Ref marks(PyObject_GetAttr(found, n.marks)), parameters(PyObject_GetAttr(module, n.parameters));
  if (!marks || !parameters || !PyDict_Check(parameters.get())) return nullptr;
  const char* isa = PyUnicode_AsUTF8(PyTuple_GET_ITEM(marks.get(), 0));
  if (!isa || std::strcmp(isa, kernels().isa) != 0) return nullptr;
  PyObject* weights = PyTuple_GET_ITEM(marks.get(), 2);
  PyObject* weight;
  Py_ssize_t at = 0;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(weights); ++i) {
    PyObject* mark = PyTuple_GET_ITEM(weights, i);  // (weight, address, version)
    if (!PyDict_Next(parameters.get(), &at, nullptr, &weight) || weight != PyTuple_GET_ITEM(mark, 0)) return nullptr;
    if (number(weight, n.version) != number(PyTuple_GET_ITEM(mark, 2))) return nullptr;
    const Tensor t = handle_of(weight);
    if (!t.get() || t.scalar_type() != dtype || !t.is_contiguous()) return nullptr;
    if (reinterpret_cast<int64_t>(t.data_ptr()) != number(PyTuple_GET_ITEM(mark, 1))) return nullptr;
  }
  return PyTuple_GET_ITEM(marks.get(), 1);
}

bool has_shape(const Tensor& t, std::initializer_list<int64_t> shape) {
  return equal(t.sizes(), Shape(shape.begin(), shape.size()));
}

// ---- a call ---------------------------------------------------------------------------------------------------------

// Of a module with this mode, on an input (steps, batch, width) or (batch, width) and states.
class StraightCall {
 public:
  StraightCall(PyObject* module, PyObject* mode, PyObject* input, PyObject* hx, int64_t dims)
      : module_(module), mode_(PyUnicode_AsUTF8(mode)), lstm_(mode_ == "LSTM") {
    if (!take(input, x_) || !take_states(hx)) return;
    if (x_->dim() != dims || x_->sizes()[dims - 1] != number(module, names().input_size)) return;
    hidden_ = number(module, names().hidden_size);
    const Ref variant(PyObject_GetAttr(module, names().variant));
    if (variant.get() != world()->plain) return;
    PyObject* packed = packed_of(module, x_->scalar_type());
    if (packed) packed_ = handle_of(packed);
  }

  // What a cell's forward returns.
  PyObject* cell() {
    if (!packed_ || !states_have({x_->sizes()[0], hidden_}, {x_->sizes()[0], hidden_})) return nullptr;
    StableIValue stack[] = {give(x_), give_optional(h_), give_optional(c_), give(packed_), from(mode_), from(hidden_)};
    if (!dispatch("handtuned::rnn_cell", stack)) return nullptr;
    const Ref states(wrap(stack, 2));
    if (!states) return nullptr;
    return lstm_ ? PyList_AsTuple(states.get()) : Py_NewRef(PyList_GET_ITEM(states.get(), 0));
  }

  // What a layer's forward returns; x is (steps, batch, width) here.
  PyObject* layer() {
    const Names& n = names();
    if (!packed_ || (is_true(module_, n.training) && is_true(module_, n.dropout))) return nullptr;
    const int64_t proj = lstm_ ? number(module_, n.proj_size) : 0, layers = number(module_, n.num_layers);
    const bool bidirectional = is_true(module_, n.bidirectional);
    const int64_t rows = layers * (1 + bidirectional), batch = x_->sizes()[1];
    if (!states_have({rows, batch, proj ? proj : hidden_}, {rows, batch, hidden_})) return nullptr;
    StableIValue stack[] = {give(x_),    from(std::nullopt), give_optional(h_), give_optional(c_), give(packed_),
                            from(mode_), from(hidden_),      from(proj),        from(layers),      from(bidirectional)};
    if (!dispatch("handtuned::rnn_inference", stack)) return nullptr;
    const Ref found(wrap(stack, 3));
    if (!found) return nullptr;
    PyObject *output = PyList_GET_ITEM(found.get(), 0), *h = PyList_GET_ITEM(found.get(), 1);
    return lstm_ ? Py_BuildValue("O(OO)", output, h, PyList_GET_ITEM(found.get(), 2)) : PyTuple_Pack(2, output, h);
  }

 private:
  template <class T>
  static StableIValue from(T value) {
    return torch::stable::detail::from(value);
  }
  static StableIValue give(OptionalTensor& t) { return from(t->release()); }
  static StableIValue give_optional(OptionalTensor& t) {
    return t ? from(new StableIValue(give(t))) : from(std::nullopt);
  }

  // A plain tensor on the CPU; None leaves `to` empty where it is `optional`.
  bool take(PyObject* object, OptionalTensor& to, bool optional = false) {
    if (optional && object == Py_None) return true;
    if (reinterpret_cast<PyObject*>(Py_TYPE(object)) != world()->tensor_type) return false;
    to = handle_of(object);
    return to->get() && to->is_cpu();
  }
  bool take_states(PyObject* hx) {
    if (!lstm_ || hx == Py_None) return take(hx, h_, true);
    return PyTuple_CheckExact(hx) && PyTuple_GET_SIZE(hx) == 2 && take(PyTuple_GET_ITEM(hx, 0), h_) &&
           take(PyTuple_GET_ITEM(hx, 1), c_);
  }
  bool states_have(std::initializer_list<int64_t> h, std::initializer_list<int64_t> c) const {
    const ScalarType dtype = x_->scalar_type();
    return (!h_ || (has_shape(*h_, h) && h_->scalar_type() == dtype)) &&
           (!c_ || (has_shape(*c_, c) && c_->scalar_type() == dtype));
  }

  static bool dispatch(const char* op, StableIValue* stack) {
    PyThreadState* state = PyEval_SaveThread();
    const bool ok = torch_call_dispatcher(op, "", stack, TORCH_ABI_VERSION) == AOTI_TORCH_SUCCESS;
    PyEval_RestoreThread(state);
    return ok;
  }

  // The dispatcher's results as a list.
  static PyObject* wrap(const StableIValue* stack, int count) {
    const Ref capsules(PyList_New(count));
    for (int i = 0; i < count; ++i)
      PyList_SET_ITEM(capsules.get(), i,
                      PyCapsule_New(torch::stable::detail::to<AtenTensorHandle>(stack[i]), nullptr, nullptr));
    return PyObject_CallOneArg(world()->tensors_of, capsules.get());
  }

  PyObject* module_;
  std::string mode_;
  bool lstm_;
  int64_t hidden_ = 0;
  OptionalTensor x_, h_, c_, packed_;
};

// (module, mode, input, hx) -> what forward returns, or None.
template <class Run>
PyObject* straight(PyObject* const* args, Py_ssize_t count, Run run) {
  if (count != 4) return PyErr_Format(PyExc_TypeError, "expected module, mode, input, hx");
  if (!world() || !nobody_watches()) Py_RETURN_NONE;
  try {
    PyObject* found = run(args[0], args[1], args[2], args[3]);
    PyErr_Clear();
    return found ? found : Py_NewRef(Py_None);
  } catch (const std::exception&) {
    Py_RETURN_NONE;
  }
}

PyObject* straight_cell(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return straight(args, count, [](PyObject* module, PyObject* mode, PyObject* input, PyObject* hx) {
    return StraightCall(module, mode, input, hx, 2).cell();
  });
}

PyObject* straight_layer(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return straight(args, count, [](PyObject* module, PyObject* mode, PyObject* input, PyObject* hx) -> PyObject* {
    if (!is_true(module, names().batch_first)) return StraightCall(module, mode, input, hx, 3).layer();
    if (reinterpret_cast<PyObject*>(Py_TYPE(input)) != world()->tensor_type) return nullptr;
    auto turned = [](PyObject* t) { return PyObject_CallMethod(t, "transpose", "ii", 0, 1); };
    const Ref x(turned(input));
    const Ref found(x ? StraightCall(module, mode, x.get(), hx, 3).layer() : nullptr);
    if (!found) return nullptr;
    const Ref output(turned(PyTuple_GET_ITEM(found.get(), 0)));
    return output ? PyTuple_Pack(2, output.get(), PyTuple_GET_ITEM(found.get(), 1)) : nullptr;
  });
}

PyMethodDef methods[] = {
    {"straight_cell", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(straight_cell)), METH_FASTCALL, nullptr},
    {"straight_layer", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(straight_layer)), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void add_straight(PyObject* module) {
  if (PyModule_AddFunctions(module, methods)) throw py::error_already_set();
}

}  // namespace handtuned
