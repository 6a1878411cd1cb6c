// Python's C API: the same on both systems but for variadic functions.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <string.h>

#include "shims.h"

typedef void* Object;

// Of the library that was opened at the start.
#define OF_PYTHON(name) ((typeof(&name))dlsym(RTLD_DEFAULT, #name))
Object PyErr_FormatV(Object, const char*, va_list);
Object PyUnicode_FromFormatV(const char*, va_list);
Object Py_VaBuildValue(const char*, va_list);
Object PyObject_CallMethod(Object, const char*, const char*, ...);
Object PyTuple_Pack(long, ...);
int PyErr_WarnFormat(Object, long, const char*, ...);
void PyErr_FormatUnraisable(const char*, ...);
void Py_DecRef(Object);

Object mac_PyErr_FormatV(Object kind, const char* format, void* stack) {
  va_list list;
  return OF_PYTHON(PyErr_FormatV)(kind, format, *linux_list(&list, stack));
}
VARIADIC(Object, PyErr_Format, 2, Object kind, const char* format) {
  return mac_PyErr_FormatV(kind, format, stack);
}
VARIADIC(Object, PyUnicode_FromFormat, 1, const char* format) {
  va_list list;
  return OF_PYTHON(PyUnicode_FromFormatV)(format, *linux_list(&list, stack));
}
VARIADIC(Object, Py_BuildValue, 1, const char* format) {
  va_list list;
  return OF_PYTHON(Py_VaBuildValue)(format, *linux_list(&list, stack));
}

// Without a function that takes a va_list: eight pointers are handed on,
// however many there are.
#define EIGHT(at) at[0], at[1], at[2], at[3], at[4], at[5], at[6], at[7]

VARIADIC(Object, PyTuple_Pack, 1, long count) {
  if (count > 8) refuse(NULL, "PyTuple_Pack of %ld objects", count);
  Object* all = stack;
  return OF_PYTHON(PyTuple_Pack)(count, EIGHT(all));
}
VARIADIC(Object, PyObject_CallMethod, 3, Object object, const char* name,
         const char* format) {
  if (format != NULL && (strlen(format) > 8 || strpbrk(format, "dfD")))
    refuse(NULL, "PyObject_CallMethod with the format %s", format);
  Object* all = stack;
  return OF_PYTHON(PyObject_CallMethod)(object, name, format, EIGHT(all));
}

// With the text instead of what it is made of.
VARIADIC(void, PyErr_FormatUnraisable, 1, const char* format) {
  Object text = variadic_PyUnicode_FromFormat(format, stack);
  if (text == NULL) return;
  OF_PYTHON(PyErr_FormatUnraisable)("%U", text);
  OF_PYTHON(Py_DecRef)(text);
}
VARIADIC(int, PyErr_WarnFormat, 3, Object category, long level,
         const char* format) {
  Object text = variadic_PyUnicode_FromFormat(format, stack);
  if (text == NULL) return -1;
  int status = OF_PYTHON(PyErr_WarnFormat)(category, level, "%U", text);
  OF_PYTHON(Py_DecRef)(text);
  return status;
}
