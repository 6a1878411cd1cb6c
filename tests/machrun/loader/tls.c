// Thread-local variables: Mach-O calls a function of each variable's
// descriptor, which may change no register but x0, x16 and x17.
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "machrun.h"

typedef struct {
  void (*thunk)(void);
  uint64_t image;  // dyld keeps a key here
  uint64_t offset;
} Descriptor;

typedef struct {
  void* of_image[kImagesMax];
} Blocks;

static __thread Blocks* t_blocks;
static pthread_key_t g_key;
static pthread_once_t g_key_made = PTHREAD_ONCE_INIT;

// Runs after the destructors of the variables (tlv_atexit), as in dyld.
static void free_blocks(void* value) {
  Blocks* blocks = value;
  for (int i = 0; i < kImagesMax; i++) free(blocks->of_image[i]);
  free(blocks);
  t_blocks = NULL;
}

static void make_key(void) { pthread_key_create(&g_key, free_blocks); }

// Called by tlv_thunk. Not to be called from a signal handler before the
// thread's first use of the image's variables: it takes memory, as dyld does.
__attribute__((used)) void* tlv_address(const Descriptor* descriptor) {
  if (t_blocks == NULL) {
    pthread_once(&g_key_made, make_key);
    t_blocks = calloc(1, sizeof *t_blocks);
    pthread_setspecific(g_key, t_blocks);
  }
  void** block = &t_blocks->of_image[descriptor->image];
  if (*block == NULL) {
    const Image* image = &g_images[descriptor->image];
    Range whole = image->thread_template;
    *block = aligned_alloc(64, ((uint64_t)whole.size + 127) & ~63ull);
    memcpy(*block, image->base + whole.offset, whole.size);
  }
  return (uint8_t*)*block + descriptor->offset;
}

// clang-format off
#define EACH_PAIR_X(F) F(1,2,0) F(3,4,16) F(5,6,32) F(7,8,48) F(9,10,64) \
  F(11,12,80) F(13,14,96) F(15,18,112)
#define EACH_PAIR_Q(F) F(0,1,128) F(2,3,160) F(4,5,192) F(6,7,224) F(8,9,256) \
  F(10,11,288) F(12,13,320) F(14,15,352) F(16,17,384) F(18,19,416) \
  F(20,21,448) F(22,23,480) F(24,25,512) F(26,27,544) F(28,29,576) F(30,31,608)
#define SAVE_X(a,b,at) "stp x" #a ",x" #b ",[sp,#" #at "]\n"
#define SAVE_Q(a,b,at) "stp q" #a ",q" #b ",[sp,#" #at "]\n"
#define LOAD_X(a,b,at) "ldp x" #a ",x" #b ",[sp,#" #at "]\n"
#define LOAD_Q(a,b,at) "ldp q" #a ",q" #b ",[sp,#" #at "]\n"
asm(".text\n.globl tlv_thunk\n.p2align 2\ntlv_thunk:\n"
    "stp x29,x30,[sp,#-16]!\n mov x29,sp\n sub sp,sp,#640\n"
    EACH_PAIR_X(SAVE_X) EACH_PAIR_Q(SAVE_Q)
    "bl tlv_address\n"
    EACH_PAIR_X(LOAD_X) EACH_PAIR_Q(LOAD_Q)
    "mov sp,x29\n ldp x29,x30,[sp],#16\n ret\n");
// clang-format on

void set_up_thread_variables(Image* image, const Section* section) {
  extern void tlv_thunk(void);
  Descriptor* all =
      (Descriptor*)at_address(image, section->addr, section->size);
  for (uint64_t i = 0; i < section->size / sizeof *all; i++) {
    if (all[i].offset >= image->thread_template.size)
      refuse(image, "damaged: a thread's variable outside of their memory");
    all[i].thunk = tlv_thunk;
    all[i].image = (uint64_t)image->number;
  }
}
