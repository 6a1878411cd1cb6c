// Formats, locales (there is only "C"), classes of characters.
#define _GNU_SOURCE
#include <ctype.h>
#include <locale.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <wchar.h>

#include "shims.h"

const char* linux_format(const char* format, char copy[1024]) {
  if (strchr(format, 'L') == NULL || strlen(format) >= 1024) return format;
  bool directive = false;
  char* to = copy;
  for (const char* at = format; *at; at++) {
    if (*at == '%') directive = !directive;
    if (directive && *at == 'L') continue;
    if (directive && *at != '%' && isalpha((unsigned char)*at) &&
        strchr("hljzt", *at) == NULL)
      directive = false;
    *to++ = *at;
  }
  *to = '\0';
  return copy;
}

#define FORMATTED(call)                \
  va_list list;                        \
  char copy[1024];                     \
  linux_list(&list, stack);            \
  format = linux_format(format, copy); \
  return call

int mac_vfprintf(FILE* out, const char* format, void* stack) {
  FORMATTED(vfprintf(out, format, list));
}
int mac_vsnprintf(char* to, size_t size, const char* format, void* stack) {
  FORMATTED(vsnprintf(to, size, format, list));
}
VARIADIC(int, printf, 1, const char* format) {
  FORMATTED(vprintf(format, list));
}
VARIADIC(int, fprintf, 2, FILE* out, const char* format) {
  FORMATTED(vfprintf(out, format, list));
}
VARIADIC(int, snprintf, 3, char* to, size_t size, const char* format) {
  FORMATTED(vsnprintf(to, size, format, list));
}
VARIADIC(int, snprintf_l, 4, char* to, size_t size, void* locale,
         const char* format) {
  (void)locale;
  FORMATTED(vsnprintf(to, size, format, list));
}
VARIADIC(int, asprintf_l, 3, char** to, void* locale, const char* format) {
  (void)locale;
  FORMATTED(vasprintf(to, format, list));
}
VARIADIC(int, sscanf, 2, const char* text, const char* format) {
  FORMATTED(vsscanf(text, format, list));
}
VARIADIC(int, swprintf, 3, wchar_t* to, size_t size, const wchar_t* format) {
  va_list list;
  linux_list(&list, stack);
  return vswprintf(to, size, format, list);
}

// ---- locales ---------------------------------------------------------------

#define L void* locale
#define UNUSED (void)locale

void* mac_newlocale(int mask, const char* name, void* base) {
  (void)mask, (void)base;
  // As macOS does where it has no locale of that name.
  return name[0] == '\0' || !strcmp(name, "C") || !strcmp(name, "POSIX")
             ? (void*)"C"
             : NULL;
}
void mac_freelocale(L) { UNUSED; }
char* mac_setlocale(int category, const char* name) {
  (void)category;
  bool known = name == NULL || name[0] == '\0' || !strcmp(name, "C");
  return known ? (char*)"C" : NULL;
}
void* mac_localeconv_l(L) {
  UNUSED;
  return localeconv();
}
int mac____mb_cur_max_l(L) {
  UNUSED;
  return 1;
}
double mac_strtod_l(const char* s, char** end, L) {
  UNUSED;
  return strtod(s, end);
}
float mac_strtof_l(const char* s, char** end, L) {
  UNUSED;
  return strtof(s, end);
}
double mac_wcstold(const wchar_t* s, wchar_t** end) { return wcstod(s, end); }
int mac_strcoll_l(const char* a, const char* b, L) {
  UNUSED;
  return strcmp(a, b);
}
size_t mac_strxfrm_l(char* to, const char* s, size_t n, L) {
  UNUSED;
  return strxfrm(to, s, n);
}
int mac_wcscoll_l(const wchar_t* a, const wchar_t* b, L) {
  UNUSED;
  return wcscmp(a, b);
}
size_t mac_wcsxfrm_l(wchar_t* to, const wchar_t* s, size_t n, L) {
  UNUSED;
  return wcsxfrm(to, s, n);
}
size_t mac_strftime_l(char* to, size_t n, const char* f, const struct tm* t,
                      L) {
  UNUSED;
  return strftime(to, n, f, t);  // struct tm is the same
}

// Bytes and characters are one in "C", so the state of a conversion stays as it
// is.
int mac_btowc_l(int c, L) {
  UNUSED;
  return c == EOF ? -1 : (unsigned char)c;
}
int mac_wctob_l(int c, L) {
  UNUSED;
  return c >= 0 && c < 256 ? c : EOF;
}
size_t mac_mbrlen_l(const char* s, size_t n, void* state, L) {
  UNUSED, (void)state;
  return n == 0 ? (size_t)-2 : *s != '\0';
}
size_t mac_mbrtowc_l(int* to, const char* s, size_t n, void* state, L) {
  if (s == NULL) return 0;
  size_t used = mac_mbrlen_l(s, n, state, locale);
  if (n > 0 && to != NULL) *to = (unsigned char)*s;
  return used;
}
int mac_mbtowc_l(int* to, const char* s, size_t n, L) {
  return (int)mac_mbrtowc_l(to, s, n, NULL, locale);
}
size_t mac_wcrtomb_l(char* to, int c, void* state, L) {
  UNUSED, (void)state;
  if (to == NULL) return 1;
  *to = (char)c;
  return c >= 0 && c < 256 ? 1 : (size_t)-1;
}
static size_t widen(int* to, const char** from, size_t bytes, size_t room) {
  size_t n = 0;
  for (const char* s = *from; n < room && n < bytes; n++, s++) {
    if (to) to[n] = (unsigned char)*s;
    if (*s == '\0') {
      if (to) *from = NULL;
      return n;
    }
  }
  if (to) *from += n;
  return n;
}
size_t mac_mbsnrtowcs_l(int* to, const char** from, size_t bytes, size_t room,
                        void* state, L) {
  UNUSED, (void)state;
  return widen(to, from, bytes, to ? room : SIZE_MAX);
}
size_t mac_mbsrtowcs_l(int* to, const char** from, size_t room, void* state,
                       L) {
  UNUSED, (void)state;
  return widen(to, from, SIZE_MAX, to ? room : SIZE_MAX);
}
size_t mac_wcsnrtombs_l(char* to, const int** from, size_t chars, size_t room,
                        void* state, L) {
  UNUSED, (void)state;
  size_t n = 0;
  for (const int* s = *from; n < chars && (to == NULL || n < room); n++, s++) {
    if (to) to[n] = (char)*s;
    if (*s == 0) {
      if (to) *from = NULL;
      return n;
    }
  }
  if (to) *from += n;
  return n;
}

// ---- classes of characters -------------------------------------------------

MacRuneLocale mac__DefaultRuneLocale;

__attribute__((constructor)) static void fill_runes(void) {
  MacRuneLocale* rune = &mac__DefaultRuneLocale;
  memcpy(rune->magic, "RuneMagA", 8);
  for (int c = 0; c < 256; c++) rune->lower[c] = rune->upper[c] = c;
  for (int c = 0; c < 128; c++) {
    rune->lower[c] = tolower(c);
    rune->upper[c] = toupper(c);
    rune->type[c] =
        (isalpha(c) ? kRuneAlpha : 0u) | (iscntrl(c) ? kRuneControl : 0u) |
        (isdigit(c) ? kRuneDigit : 0u) | (isgraph(c) ? kRuneGraph : 0u) |
        (islower(c) ? kRuneLower : 0u) | (ispunct(c) ? kRunePunct : 0u) |
        (isspace(c) ? kRuneSpace : 0u) | (isupper(c) ? kRuneUpper : 0u) |
        (isxdigit(c) ? kRuneHex : 0u) | (isblank(c) ? kRuneBlank : 0u) |
        (isprint(c) ? kRunePrint : 0u);
  }
}

int mac___maskrune(int c, unsigned long mask) {
  return c >= 0 && c < 128 ? (int)(mac__DefaultRuneLocale.type[c] & mask) : 0;
}
int mac___maskrune_l(int c, unsigned long mask, L) {
  UNUSED;
  return mac___maskrune(c, mask);
}
int mac___tolower(int c) { return c >= 0 && c < 128 ? tolower(c) : c; }
int mac___toupper(int c) { return c >= 0 && c < 128 ? toupper(c) : c; }
int mac____tolower_l(int c, L) {
  UNUSED;
  return mac___tolower(c);
}
int mac____toupper_l(int c, L) {
  UNUSED;
  return mac___toupper(c);
}

// Message catalogues: there are none.
void* mac_catopen(const char* name, int flag) {
  (void)name, (void)flag;
  return (void*)-1;
}
char* mac_catgets(void* catalogue, int set, int message, char* text) {
  (void)catalogue, (void)set, (void)message;
  return text;
}
int mac_catclose(void* catalogue) {
  (void)catalogue;
  return -1;
}
