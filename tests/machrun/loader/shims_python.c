// Python's C API: the same on both systems but for variadic functions.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <string.h>

#include "shims.h"

typedef void* Object;

#define OF_PYTHON(name) ((typeof(&name))dlsym(RTLD_DEFAULT, #name))
Object PyErr_FormatV(Object, const char*, va_list);
Object PyUnicode_FromFormatV(const char*, va_list);
Object Py_VaBuildValue(const char*, va_list);
Object PyObject_GetAttrString(Object, const char*);
Object PyObject_CallObject(Object, Object);
Object PyTuple_New(long);
int PyTuple_SetItem(Object, long, Object);
void Py_IncRef(Object);
void Py_DecRef(Object);
int PyErr_WarnEx(Object, const char*, long);
const char* PyUnicode_AsUTF8AndSize(Object, long*);

Object mac_PyErr_FormatV(Object kind, const char* format, void* stack) {
  va_list list;
  return OF_PYTHON(PyErr_FormatV)(kind, format, *linux_list(&list, stack));
}
Object mac_PyUnicode_FromFormatV(const char* format, void* stack) {
  va_list list;
  return OF_PYTHON(PyUnicode_FromFormatV)(format, *linux_list(&list, stack));
}
VARIADIC(Object, PyErr_Format, 2, Object kind, const char* format) {
  return mac_PyErr_FormatV(kind, format, stack);
}
VARIADIC(Object, PyUnicode_FromFormat, 1, const char* format) {
  return mac_PyUnicode_FromFormatV(format, stack);
}
VARIADIC(Object, Py_BuildValue, 1, const char* format) {
  va_list list;
  return OF_PYTHON(Py_VaBuildValue)(format, *linux_list(&list, stack));
}
VARIADIC(Object, PyObject_CallMethod, 3, Object object, const char* name,
         const char* format) {
  char tuple[256];
  va_list list;
  bool whole = format != NULL && format[0] == '(';
  if (format != NULL && strlen(format) > sizeof tuple - 3)
    refuse(NULL, "PyObject_CallMethod with the long format %s", format);
  snprintf(tuple, sizeof tuple, whole ? "%s" : "(%s)", format ? format : "");
  Object method = OF_PYTHON(PyObject_GetAttrString)(object, name);
  if (method == NULL) return NULL;
  Object arguments =
      OF_PYTHON(Py_VaBuildValue)(tuple, *linux_list(&list, stack));
  Object result =
      arguments ? OF_PYTHON(PyObject_CallObject)(method, arguments) : NULL;
  OF_PYTHON(Py_DecRef)(method);
  if (arguments != NULL) OF_PYTHON(Py_DecRef)(arguments);
  return result;
}
VARIADIC(void, PyErr_FormatUnraisable, 1, const char* format) {
  void (*real)(const char*, ...) =
      dlsym(RTLD_DEFAULT, "PyErr_FormatUnraisable");
  Object text = mac_PyUnicode_FromFormatV(format, stack);
  if (text != NULL) real("%U", text);
  if (text != NULL) OF_PYTHON(Py_DecRef)(text);
}
VARIADIC(int, PyErr_WarnFormat, 3, Object category, long level,
         const char* format) {
  Object text = mac_PyUnicode_FromFormatV(format, stack);
  if (text == NULL) return -1;
  const char* utf8 = OF_PYTHON(PyUnicode_AsUTF8AndSize)(text, NULL);
  int status = utf8 ? OF_PYTHON(PyErr_WarnEx)(category, utf8, level) : -1;
  OF_PYTHON(Py_DecRef)(text);
  return status;
}
VARIADIC(Object, PyTuple_Pack, 1, long count) {
  Object tuple = OF_PYTHON(PyTuple_New)(count);
  for (long i = 0; tuple != NULL && i < count; i++) {
    Object item = ((Object*)stack)[i];
    OF_PYTHON(Py_IncRef)(item);
    OF_PYTHON(PyTuple_SetItem)(tuple, i, item);
  }
  return tuple;
}
