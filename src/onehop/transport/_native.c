/* Sends to ZeroMQ sockets, and receives from them, without letting go of the interpreter's lock.
 *
 * pyzmq releases the GIL around each frame, also where nothing can wait. With a dozen threads wanting it, every release
 * starts a fight that costs more than the message. Here it is released in one place: where a thread goes to sleep.
 *
 * Optional: where this was not compiled, the same is done through pyzmq. A socket is an address (pyzmq's
 * Socket.underlying); its owner keeps it open, and keeps other threads away, for as long as a call lasts.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <dlfcn.h>
#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#if PY_VERSION_HEX < 0x030D0000
#define PyLong_AsInt _PyLong_AsInt /* its name until Python 3.13 */
#endif

/* libzmq ----------------------------------------------------------------------------------------- */

/* What zmq.h says since libzmq 4. Not included, so that building needs nothing but Python; and not linked, since a
 * second libzmq in the process would not know the sockets of the first. */

typedef struct {
    _Alignas(void *) unsigned char opaque[64];
} zmq_msg_t;

enum { ZMQ_DONTWAIT = 1, ZMQ_SNDMORE = 2 };

#define EACH_FUNCTION(DO)                             \
    DO(int, zmq_msg_init, (zmq_msg_t *))              \
    DO(int, zmq_msg_init_size, (zmq_msg_t *, size_t)) \
    DO(int, zmq_msg_send, (zmq_msg_t *, void *, int)) \
    DO(int, zmq_msg_recv, (zmq_msg_t *, void *, int)) \
    DO(int, zmq_msg_move, (zmq_msg_t *, zmq_msg_t *)) \
    DO(int, zmq_msg_close, (zmq_msg_t *))             \
    DO(void *, zmq_msg_data, (zmq_msg_t *))           \
    DO(size_t, zmq_msg_size, (const zmq_msg_t *))     \
    DO(int, zmq_msg_more, (const zmq_msg_t *))        \
    DO(int, zmq_errno, (void))                        \
    DO(const char *, zmq_strerror, (int))

#define DECLARE(result, name, arguments) static result(*name) arguments;
#define LIST(result, name, arguments) {#name, (void **)&name},

EACH_FUNCTION(DECLARE)

static const struct {
    const char *name;
    void **pointer;
} functions[] = {EACH_FUNCTION(LIST)};

enum { FUNCTIONS = sizeof functions / sizeof *functions };

static void *library; /* NULL until bind() has found every function in it */

static PyObject *bind_library(PyObject *Py_UNUSED(module), PyObject *path)
{
    void *found[FUNCTIONS];
    const char *name = PyUnicode_AsUTF8(path);
    if (name == NULL)
        return NULL;
    void *opened = dlopen(name, RTLD_NOW | RTLD_NOLOAD);
    if (opened == NULL)
        return PyErr_Format(PyExc_ImportError, "%s is not loaded: give the file of pyzmq's imported backend", name);
    for (int i = 0; i < FUNCTIONS; i++) {
        found[i] = dlsym(opened, functions[i].name);
        if (found[i] == NULL) {
            dlclose(opened);
            return PyErr_Format(PyExc_ImportError, "%s does not lead to libzmq: %s is not found", name,
                                functions[i].name);
        }
    }
    for (int i = 0; i < FUNCTIONS; i++)
        *functions[i].pointer = found[i];
    library = opened; /* never closed: bodies may outlive everything else */
    Py_RETURN_NONE;
}

static int fail(int number)
{
    if (number == EHOSTUNREACH) {
        PyErr_SetString(PyExc_ConnectionResetError, "the connection has ended");
        return -1;
    }
    PyObject *arguments = Py_BuildValue("is", number, zmq_strerror(number)); /* libzmq has numbers of its own */
    if (arguments != NULL) {
        PyErr_SetObject(PyExc_OSError, arguments);
        Py_DECREF(arguments);
    }
    return -1;
}

/* Arguments -------------------------------------------------------------------------------------- */

static int expect(const char *name, Py_ssize_t wanted, Py_ssize_t given)
{
    if (library == NULL)
        PyErr_SetString(PyExc_RuntimeError, "not bound to libzmq: call bind() first");
    else if (wanted != given)
        PyErr_Format(PyExc_TypeError, "%s() takes %zd arguments, %zd were given", name, wanted, given);
    else
        return 0;
    return -1;
}

/* Zero passes: libzmq answers it with ENOTSOCK, as it does an address that is no socket. */
static int to_socket(PyObject *address, void **socket)
{
    *socket = PyLong_AsVoidPtr(address);
    return *socket == NULL && PyErr_Occurred() ? -1 : 0;
}

static int to_int(PyObject *number, int *value)
{
    *value = PyLong_AsInt(number);
    return *value == -1 && PyErr_Occurred() ? -1 : 0;
}

/* A message of ZeroMQ with a copy of `bytes`. */
static int to_message(PyObject *bytes, zmq_msg_t *message)
{
    char *data;
    Py_ssize_t size;
    if (PyBytes_AsStringAndSize(bytes, &data, &size) < 0)
        return -1;
    if (zmq_msg_init_size(message, (size_t)size) < 0)
        return fail(zmq_errno());
    memcpy(zmq_msg_data(message), data, (size_t)size);
    return 0;
}

/* Sending ---------------------------------------------------------------------------------------- */

/* 1: libzmq has taken the message; 0: there is no room; -1: an error is set. Whichever, there is nothing to close. */
static int hand_over(zmq_msg_t *message, void *socket, int flags)
{
    while (zmq_msg_send(message, socket, flags | ZMQ_DONTWAIT) < 0) {
        int number = zmq_errno();
        if (number == EINTR)
            continue;
        zmq_msg_close(message);
        return number == EAGAIN ? 0 : fail(number);
    }
    return 1;
}

static PyObject *send_frame(PyObject *Py_UNUSED(module), PyObject *const *given, Py_ssize_t count)
{
    void *socket;
    zmq_msg_t frame;
    if (expect("send", 2, count) < 0 || to_socket(given[0], &socket) < 0 || to_message(given[1], &frame) < 0)
        return NULL;
    int taken = hand_over(&frame, socket, 0);
    return taken < 0 ? NULL : PyBool_FromLong(taken);
}

static PyObject *send_frame_to(PyObject *Py_UNUSED(module), PyObject *const *given, Py_ssize_t count)
{
    void *socket;
    zmq_msg_t identity, frame;
    if (expect("send_to", 3, count) < 0 || to_socket(given[0], &socket) < 0 || to_message(given[1], &identity) < 0)
        return NULL;
    /* Both are made before the first is sent: once libzmq has the identity, the frame has to follow. It does not ask
     * for room again, which it counts in messages. */
    if (to_message(given[2], &frame) < 0) {
        zmq_msg_close(&identity);
        return NULL;
    }
    int taken = hand_over(&identity, socket, ZMQ_SNDMORE);
    if (taken == 1)
        taken = hand_over(&frame, socket, 0);
    else
        zmq_msg_close(&frame);
    return taken < 0 ? NULL : PyBool_FromLong(taken);
}

/* Receiving -------------------------------------------------------------------------------------- */

/* The owner of a message that a memoryview shows, so that a large body is never copied. */
typedef struct {
    PyObject_HEAD
    zmq_msg_t message;
} Body;

static void body_dealloc(PyObject *self)
{
    zmq_msg_close(&((Body *)self)->message);
    PyObject_Free(self);
}

static int body_getbuffer(PyObject *self, Py_buffer *view, int flags)
{
    zmq_msg_t *message = &((Body *)self)->message;
    /* Read-only: inside one process it may be the sender's own memory. */
    return PyBuffer_FillInfo(view, self, zmq_msg_data(message), (Py_ssize_t)zmq_msg_size(message), 1, flags);
}

static PyBufferProcs body_as_buffer = {.bf_getbuffer = body_getbuffer};

static PyTypeObject Body_Type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "onehop.transport._native.Body",
    .tp_basicsize = sizeof(Body),
    .tp_dealloc = body_dealloc,
    .tp_as_buffer = &body_as_buffer,
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
};

static PyObject *view_of(zmq_msg_t *message)
{
    Body *body = PyObject_New(Body, &Body_Type);
    if (body == NULL)
        return NULL;
    zmq_msg_init(&body->message);
    zmq_msg_move(&body->message, message);
    PyObject *view = PyMemoryView_FromObject((PyObject *)body);
    Py_DECREF(body);
    return view;
}

/* Receives one message up to its last frame: what is left behind would be taken for the next message, and its first
 * frame for an identity. The first `wide` frames are kept, the place behind them takes those that nobody wants. Returns
 * how many there were; 0 when no message is there; -1 when an error is set. */
static int receive(void *socket, zmq_msg_t *frames, int wide)
{
    int count = 0, more = 1;
    while (more) {
        zmq_msg_t *frame = &frames[count < wide ? count : wide];
        if (zmq_msg_recv(frame, socket, ZMQ_DONTWAIT) >= 0) {
            more = zmq_msg_more(frame);
            count++;
            continue;
        }
        int number = zmq_errno();
        if (number == EAGAIN && count == 0)
            return 0;
        if (number != EINTR)
            return fail(number);
    }
    return count;
}

/* (identity, frame, body) from a ROUTER, which is 3 `wide`, or (frame, body) from a DEALER, which is 2. A message with
 * more frames, or without one after the identity, is none of ours: its frame is empty, and refused as too short. */
static PyObject *to_entry(zmq_msg_t *frames, int count, int wide)
{
    PyObject *entry = PyTuple_New(wide);
    for (int i = 0; entry != NULL && i < wide; i++) {
        PyObject *item;
        if (i < wide - 1) {
            size_t size = i == wide - 2 && count > wide ? 0 : zmq_msg_size(&frames[i]);
            item = PyBytes_FromStringAndSize(zmq_msg_data(&frames[i]), (Py_ssize_t)size);
        } else {
            item = count < wide ? Py_NewRef(Py_None) : view_of(&frames[i]);
        }
        if (item == NULL)
            Py_CLEAR(entry);
        else
            PyTuple_SET_ITEM(entry, i, item);
    }
    return entry;
}

/* Appends at most `limit` messages. 1: the limit came first; 0: none is left; -1: an error is set. */
static int receive_into(void *socket, int limit, PyObject *into, int wide)
{
    zmq_msg_t frames[4];
    for (; limit > 0; limit--) {
        for (int i = 0; i <= wide; i++)
            zmq_msg_init(&frames[i]);
        int count = receive(socket, frames, wide);
        PyObject *entry = count > 0 ? to_entry(frames, count, wide) : NULL;
        for (int i = 0; i <= wide; i++)
            zmq_msg_close(&frames[i]);
        if (count == 0)
            return 0;
        int appended = entry == NULL ? -1 : PyList_Append(into, entry);
        Py_XDECREF(entry);
        if (appended < 0)
            return -1;
    }
    return 1;
}

static int expect_list(const char *name, PyObject *into)
{
    if (PyList_Check(into))
        return 0;
    PyErr_Format(PyExc_TypeError, "%s() appends to a list, not to %.100s", name, Py_TYPE(into)->tp_name);
    return -1;
}

static PyObject *drain_into(const char *name, PyObject *const *given, Py_ssize_t count, int wide)
{
    void *socket;
    int limit;
    if (expect(name, 3, count) < 0 || to_socket(given[0], &socket) < 0 || to_int(given[1], &limit) < 0 ||
        expect_list(name, given[2]) < 0)
        return NULL;
    int more = receive_into(socket, limit, given[2], wide);
    return more < 0 ? NULL : PyBool_FromLong(more);
}

static PyObject *drain(PyObject *Py_UNUSED(module), PyObject *const *given, Py_ssize_t count)
{
    return drain_into("drain", given, count, 2);
}

static PyObject *drain_from(PyObject *Py_UNUSED(module), PyObject *const *given, Py_ssize_t count)
{
    return drain_into("drain_from", given, count, 3);
}

/* Waiting ---------------------------------------------------------------------------------------- */

static int64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

/* 1, for `fd`, and 2, for `wake`, together; -1 when an error is set. */
static int sleep_until(int fd, int wake, int left)
{
    struct pollfd both[] = {{.fd = fd, .events = POLLIN}, {.fd = wake, .events = POLLIN}};
    int64_t end = now() + (int64_t)left * 1000000;
    for (;;) {
        int ready;
        Py_BEGIN_ALLOW_THREADS
        ready = poll(both, 2, left);
        Py_END_ALLOW_THREADS
        if (ready >= 0)
            break;
        if (errno != EINTR)
            return PyErr_SetFromErrno(PyExc_OSError), -1;
        if (PyErr_CheckSignals() < 0)
            return -1;
        if (left > 0) {
            int64_t rest = (end - now() + 999999) / 1000000; /* rounded up: too short a wait becomes a busy one */
            left = rest > 0 ? (int)rest : 0;
        }
    }
    if (both[1].revents != 0) {
        uint64_t times;
        if (read(wake, &times, sizeof times) < 0 && errno != EAGAIN)
            return PyErr_SetFromErrno(PyExc_OSError), -1;
    }
    return (both[0].revents != 0) | (both[1].revents != 0) << 1;
}

static PyObject *wait_for(PyObject *Py_UNUSED(module), PyObject *const *given, Py_ssize_t count)
{
    int fd, wake, left;
    if (expect("wait", 3, count) < 0 || to_int(given[0], &fd) < 0 || to_int(given[1], &wake) < 0 ||
        to_int(given[2], &left) < 0)
        return NULL;
    int ready = sleep_until(fd, wake, left);
    return ready < 0 ? NULL : PyLong_FromLong(ready);
}

/* One message is read at most: who is alone waits for one. The look before the wait is needed, since the descriptor is
 * an edge that the sending may have eaten. 1: it was waited for; 0: it was there already; -1: an error is set. */
static int receive_one(void *socket, int fd, int wake, int left, PyObject *into, int wide)
{
    int arrived = receive_into(socket, 1, into, wide);
    if (arrived != 0)
        return arrived < 0 ? -1 : 0;
    if (sleep_until(fd, wake, left) < 0 || receive_into(socket, 1, into, wide) < 0)
        return -1;
    return 1;
}

static PyObject *receive_from(PyObject *Py_UNUSED(module), PyObject *const *given, Py_ssize_t count)
{
    void *socket;
    int fd, wake, left;
    if (expect("receive_from", 5, count) < 0 || to_socket(given[0], &socket) < 0 || to_int(given[1], &fd) < 0 ||
        to_int(given[2], &wake) < 0 || to_int(given[3], &left) < 0 || expect_list("receive_from", given[4]) < 0)
        return NULL;
    int waited = receive_one(socket, fd, wake, left, given[4], 3);
    return waited < 0 ? NULL : PyBool_FromLong(waited);
}

static PyObject *exchange(PyObject *Py_UNUSED(module), PyObject *const *given, Py_ssize_t count)
{
    void *socket;
    int fd, wake, left;
    zmq_msg_t frame;
    if (expect("exchange", 6, count) < 0 || to_socket(given[0], &socket) < 0 || to_int(given[2], &fd) < 0 ||
        to_int(given[3], &wake) < 0 || to_int(given[4], &left) < 0 || expect_list("exchange", given[5]) < 0 ||
        to_message(given[1], &frame) < 0)
        return NULL;
    int taken = hand_over(&frame, socket, 0);
    if (taken <= 0)
        return taken < 0 ? NULL : PyBool_FromLong(0);
    return receive_one(socket, fd, wake, left, given[5], 2) < 0 ? NULL : PyBool_FromLong(1);
}

/* The module ------------------------------------------------------------------------------------- */

#define METHOD(name, function, signature) \
    {name, (PyCFunction)(void (*)(void))function, METH_FASTCALL, PyDoc_STR(name "($module, " signature ", /)\n--\n\n")}

static PyMethodDef methods[] = {
    {"bind", bind_library, METH_O, PyDoc_STR("bind($module, path, /)\n--\n\n")},
    METHOD("send", send_frame, "socket, frame"),
    METHOD("send_to", send_frame_to, "socket, identity, frame"),
    METHOD("drain", drain, "socket, limit, into"),
    METHOD("drain_from", drain_from, "socket, limit, into"),
    METHOD("wait", wait_for, "fd, wake, milliseconds"),
    METHOD("receive_from", receive_from, "socket, fd, wake, milliseconds, into"),
    METHOD("exchange", exchange, "socket, frame, fd, wake, milliseconds, into"),
    {NULL, NULL, 0, NULL},
};

static int execute(PyObject *Py_UNUSED(module))
{
    return PyType_Ready(&Body_Type);
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, (void *)execute},
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "onehop.transport._native",
    .m_doc = PyDoc_STR("Sends and receives without letting go of the interpreter's lock; see _native.pyi."),
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__native(void)
{
    return PyModuleDef_Init(&definition);
}
