// A frame of C between the one that throws and the one that catches.
void call_through(void (*function)(void), volatile int* calls);
void call_through(void (*function)(void), volatile int* calls) {
  function();
  ++*calls;
}
