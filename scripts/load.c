/* The load client of scripts/bench: many Server-Sent Events connections in one process with one epoll.

   It counts a delivery when a whole frame has arrived (up to its blank line, after chunked transfer coding is taken
   off) whose data holds "tick=<number>=<ns>=": the event's number in its task, 1, 2, 3 …, and when it was published,
   by CLOCK_MONOTONIC. A number that is left out is lost, one that is not new is repeated.

   It must never let the servers pay for it: while a fan-out runs it looks for input without sleeping, since to wake a
   sleeper costs the writer as much as the write itself. What it spends on looks that find nothing counts as idle.

   One command per line on stdin:
       open COUNT PORT RCVBUF PATH   each connection asks for PATH, in which %d becomes 0, 1, 2 …; answers `opened`.
                                     RCVBUF above 0: so small a buffer, and after the head of the answer no more reads.
       mark                          forgets what was counted; no answer.
       expect COUNT SPIN             answers `got` once so many more than expected so far have come, early ones included;
                                     SPIN 1: as said above.
       resume NUMBER                 those that did not read read on, and come back behind their last id when the server
                                     has cut them off, until all have seen that number; answers `resumed`.
       report                        answers with one line of JSON.
   `failed <why>` can be the answer to any. The end of stdin ends the process. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
    CONNECTIONS_MAX = 16384,
    CONNECTING_MAX = 128, /* below every server's backlog */
    LATENCIES_MAX = 4 * 1024 * 1024,
    BUFFER_MIN = 2048,
    BUFFER_MAX = 4 * 1024 * 1024,
    ID_MAX = 64,
    PATH_BYTES_MAX = 512,
    EVENTS_MAX = 512,
    LIFE_SECONDS_MAX = 3600,
};

enum state { CONNECTING, HEAD, BODY, STALLED, CLOSED };
enum chunk { PLAIN, SIZE, EXTENSION, DATA, DATA_END, LAST };

struct connection {
    int fd;
    enum state state;
    enum chunk chunk;
    size_t chunk_left;
    char *buffer; /* decoded bytes of a frame that is not whole; the head of the answer before that */
    size_t length, capacity;
    uint32_t number; /* of the last delivery */
    bool stalling;
    char id[ID_MAX];
    char *path;
    int port, rcvbuf;
};

static struct connection *connections;
static int count, wanted, connecting, opening_from;
static int epoll;
static uint32_t *latencies;
static size_t recorded;
static uint64_t deliveries, frame_bytes, wire_bytes, lost, repeated, cuts;
static uint64_t expected_from, expected, deliveries_ever;
static uint32_t resume_to;
static bool spinning, opening, resuming;
static int64_t idle_ns, marked_cpu_ns, marked_ns, last_ns;

static int64_t clock_ns(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static void say(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
    putchar('\n');
    fflush(stdout);
}

#define FAIL(...) (say("failed " __VA_ARGS__), exit(1))

static void watch(struct connection *c, int operation, uint32_t events) {
    struct epoll_event event = {.events = events, .data.ptr = c};
    if (epoll_ctl(epoll, operation, c->fd, &event) < 0) FAIL("epoll_ctl: %s", strerror(errno));
}

/* Connections */

static void start(struct connection *c) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)c->port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (c->fd < 0) FAIL("socket: %s", strerror(errno));
    if (c->rcvbuf && setsockopt(c->fd, SOL_SOCKET, SO_RCVBUF, &c->rcvbuf, sizeof c->rcvbuf) < 0)
        FAIL("SO_RCVBUF: %s", strerror(errno));
    if (connect(c->fd, (struct sockaddr *)&address, sizeof address) < 0 && errno != EINPROGRESS)
        FAIL("connect: %s", strerror(errno));
    c->state = CONNECTING;
    c->chunk = PLAIN;
    c->length = c->chunk_left = 0;
    watch(c, EPOLL_CTL_ADD, EPOLLOUT);
    connecting++;
}

static void start_more(void) {
    while (opening_from < wanted && connecting < CONNECTING_MAX) start(&connections[opening_from++]);
}

static void opened(void) {
    connecting--;
    start_more();
    if (opening && connecting == 0 && opening_from == wanted) {
        opening = false;
        say("opened");
    }
}

static void ask(struct connection *c) {
    int error = 0;
    socklen_t size = sizeof error;
    getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &size);
    if (error) FAIL("connect: %s", strerror(error));
    char text[PATH_BYTES_MAX + 2 * ID_MAX + 256], last[ID_MAX + 32] = "";
    if (c->id[0]) snprintf(last, sizeof last, "Last-Event-ID: %s\r\n", c->id);
    int length = snprintf(text, sizeof text,
                          "GET %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nX-API-Key: sk_test_123456\r\n"
                          "Accept: text/event-stream\r\n%s\r\n",
                          c->path, c->port, last);
    if (send(c->fd, text, (size_t)length, MSG_NOSIGNAL) != length) FAIL("send: %s", strerror(errno));
    c->state = HEAD;
    watch(c, EPOLL_CTL_MOD, EPOLLIN);
}

static void end(struct connection *c) {
    bool was_opening = c->state == CONNECTING || c->state == HEAD;
    close(c->fd);
    c->state = CLOSED;
    if (resuming && c->stalling && c->number < resume_to) {
        cuts++;
        if (was_opening) connecting--; /* turned away: it tries again */
        start(c);
    } else if (was_opening) {
        FAIL("a connection was closed before its answer began");
    } else if (!c->stalling) {
        FAIL("the server closed a stream");
    }
}

/* Frames */

static void check_resumed(void) {
    for (int i = 0; i < count; i++)
        if (connections[i].stalling && connections[i].number < resume_to) return;
    resuming = false;
    say("resumed");
}

static void check_expected(void) {
    if (deliveries_ever != expected) return;
    spinning = false;
    say("got");
}

static void frame(struct connection *c, char *from, char *to, int64_t now) {
    char *data = from;
    while (data < to && strncmp(data, "data:", 5) != 0) {
        char *line_end = memchr(data, '\n', (size_t)(to - data));
        if (strncmp(data, "id: ", 4) == 0 && line_end - data - 4 < ID_MAX) {
            size_t length = (size_t)(line_end - data) - 4;
            memcpy(c->id, data + 4, length);
            c->id[length] = 0;
        }
        data = line_end + 1;
    }
    char *found = data < to ? memmem(data, (size_t)(to - data), "tick=", 5) : NULL;
    if (!found) return;
    uint32_t number = (uint32_t)strtoul(found + 5, &found, 10);
    int64_t latency = now - strtoll(found + 1, NULL, 10);
    if (number <= c->number) {
        repeated++;
        return;
    }
    lost += number - c->number - 1;
    c->number = number;
    deliveries++;
    frame_bytes += (uint64_t)(to - from);
    if (c->stalling) return;
    last_ns = now;
    if (recorded < LATENCIES_MAX) latencies[recorded++] = latency < UINT32_MAX ? (uint32_t)latency : UINT32_MAX;
    deliveries_ever++;
    check_expected();
}

/* Takes the chunked coding off `size` bytes behind the buffer's end, in place; what remains is at the end. */
static size_t decoded(struct connection *c, size_t size) {
    char *in = c->buffer + c->length, *out = in, *end = in + size;
    while (in < end) {
        switch (c->chunk) {
        case SIZE:
        case EXTENSION:
            if (*in == '\n') {
                c->chunk = c->chunk_left ? DATA : LAST;
            } else if (c->chunk == EXTENSION || *in == ';') {
                c->chunk = EXTENSION;
            } else if (*in != '\r') {
                int digit = *in <= '9' ? *in - '0' : (*in | 32) - 'a' + 10;
                if (digit < 0 || digit > 15) FAIL("a chunk's size is not a number");
                c->chunk_left = c->chunk_left * 16 + (size_t)digit;
            }
            in++;
            break;
        case DATA: {
            size_t taken = (size_t)(end - in) < c->chunk_left ? (size_t)(end - in) : c->chunk_left;
            memmove(out, in, taken);
            in += taken;
            out += taken;
            c->chunk_left -= taken;
            if (!c->chunk_left) c->chunk = DATA_END;
            break;
        }
        case DATA_END:
            if (*in != '\r' && *in != '\n') FAIL("a chunk is longer than it says");
            if (*in++ == '\n') c->chunk = SIZE;
            break;
        case PLAIN:
            return size;
        case LAST:
            return (size_t)(out - c->buffer) - c->length;
        }
    }
    return (size_t)(out - c->buffer) - c->length;
}

static void body(struct connection *c, size_t size, int64_t now) {
    size_t seen = c->length ? c->length - 1 : 0;
    c->length += decoded(c, size);
    char *from = c->buffer, *look = from + seen, *end = from + c->length, *found;
    while ((found = memchr(look, '\n', (size_t)(end - look)))) { /* many times quicker than memmem for a blank line */
        look = found + 1;
        if (look < end && *look == '\n') {
            frame(c, from, ++look, now);
            from = look;
        }
    }
    c->length = (size_t)(end - from);
    if (from != c->buffer) memmove(c->buffer, from, c->length);
}

static bool head(struct connection *c, size_t size, int64_t now) {
    c->length += size;
    c->buffer[c->length] = 0;
    char *found = strstr(c->buffer, "\r\n\r\n");
    if (!found) return false;
    if (strncmp(c->buffer, "HTTP/1.1 200", 12) != 0) FAIL("answered %.*s", (int)strcspn(c->buffer, "\r"), c->buffer);
    found[2] = 0;
    c->chunk = strcasestr(c->buffer, "\r\ntransfer-encoding: chunked\r\n") ? SIZE : PLAIN;
    size_t rest = c->length - (size_t)(found + 4 - c->buffer);
    memmove(c->buffer, found + 4, rest);
    c->length = 0;
    body(c, rest, now);
    return true;
}

static void take(struct connection *c) {
    if (c->capacity - c->length < BUFFER_MIN / 2) {
        c->capacity = c->capacity ? c->capacity * 2 : BUFFER_MIN;
        if (c->capacity > BUFFER_MAX) FAIL("a frame has more than %d bytes", BUFFER_MAX / 2);
        c->buffer = realloc(c->buffer, c->capacity);
        if (!c->buffer) FAIL("no memory");
    }
    ssize_t size = recv(c->fd, c->buffer + c->length, c->capacity - c->length - 1, 0);
    if (size < 0 && errno == EAGAIN) return;
    if (size <= 0) {
        end(c);
        return;
    }
    wire_bytes += (uint64_t)size;
    int64_t now = clock_ns(CLOCK_MONOTONIC);
    if (c->state == BODY) {
        body(c, (size_t)size, now);
    } else if (head(c, (size_t)size, now)) {
        c->state = BODY;
        if (c->stalling && !resuming) {
            c->state = STALLED;
            watch(c, EPOLL_CTL_DEL, 0);
        }
        opened();
    }
    if (resuming && c->stalling && c->number >= resume_to) check_resumed();
}

/* Commands */

static int by_size(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static uint32_t percentile(int percent) {
    return recorded ? latencies[(recorded - 1) * (size_t)percent / 100] : 0;
}

static void mark(void) {
    deliveries = frame_bytes = wire_bytes = lost = repeated = cuts = 0;
    recorded = 0;
    idle_ns = 0;
    last_ns = marked_ns = clock_ns(CLOCK_MONOTONIC);
    marked_cpu_ns = clock_ns(CLOCK_PROCESS_CPUTIME_ID);
}

static void report(void) {
    int64_t cpu_ns = clock_ns(CLOCK_PROCESS_CPUTIME_ID) - marked_cpu_ns - idle_ns;
    qsort(latencies, recorded, sizeof *latencies, by_size);
    say("{\"deliveries\":%lu,\"frame_bytes\":%lu,\"wire_bytes\":%lu,\"lost\":%lu,\"repeated\":%lu,"
        "\"cuts\":%lu,\"p50_ns\":%u,\"p99_ns\":%u,\"cpu_ns\":%ld,\"wall_ns\":%ld}",
        deliveries, frame_bytes, wire_bytes, lost, repeated, cuts, percentile(50), percentile(99), cpu_ns,
        last_ns - marked_ns);
}

static void open_more(int more, int port, int rcvbuf, const char *path) {
    if (count + more > CONNECTIONS_MAX) FAIL("at most %d connections", CONNECTIONS_MAX);
    const char *hole = strstr(path, "%d");
    for (int i = 0; i < more; i++) {
        struct connection *c = &connections[count++];
        *c = (struct connection){.port = port, .rcvbuf = rcvbuf, .stalling = rcvbuf > 0};
        int before = hole ? (int)(hole - path) : (int)strlen(path);
        char number[16] = "";
        if (hole) snprintf(number, sizeof number, "%d", i);
        if (asprintf(&c->path, "%.*s%s%s", before, path, number, hole ? hole + 2 : "") < 0) FAIL("no memory");
    }
    wanted = count;
    opening = true;
    start_more();
}

static void resume(uint32_t number) {
    resume_to = number;
    resuming = true;
    for (int i = 0; i < count; i++) {
        struct connection *c = &connections[i];
        if (c->state != STALLED) continue;
        c->state = BODY;
        c->rcvbuf = 0;
        watch(c, EPOLL_CTL_ADD, EPOLLIN);
    }
    check_resumed();
}

static void command(char *line) {
    char path[PATH_BYTES_MAX];
    int more, port, rcvbuf, spin;
    unsigned number;
    uint64_t deliveries_more;
    if (sscanf(line, "open %d %d %d %511s", &more, &port, &rcvbuf, path) == 4) {
        open_more(more, port, rcvbuf, path);
    } else if (sscanf(line, "expect %lu %d", &deliveries_more, &spin) == 2) {
        expected_from = expected;
        expected += deliveries_more;
        spinning = spin;
        check_expected();
    } else if (sscanf(line, "resume %u", &number) == 1) {
        resume(number);
    } else if (strncmp(line, "mark", 4) == 0) {
        mark();
    } else if (strncmp(line, "report", 6) == 0) {
        report();
    } else {
        FAIL("no such command: %s", line);
    }
}

static void hear(void) {
    static char text[4096];
    static size_t length;
    ssize_t size = read(STDIN_FILENO, text + length, sizeof text - length - 1);
    if (size <= 0) exit(0);
    length += (size_t)size;
    text[length] = 0;
    char *line = text, *line_end;
    for (; (line_end = strchr(line, '\n')); line = line_end + 1) {
        *line_end = 0;
        command(line);
    }
    length = strlen(line);
    memmove(text, line, length);
}

int main(void) {
    struct epoll_event events[EVENTS_MAX], commands = {.events = EPOLLIN, .data.ptr = NULL};
    alarm(LIFE_SECONDS_MAX);
    connections = calloc(CONNECTIONS_MAX, sizeof *connections);
    latencies = malloc(LATENCIES_MAX * sizeof *latencies);
    epoll = epoll_create1(EPOLL_CLOEXEC);
    if (!connections || !latencies || epoll < 0) FAIL("no memory");
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, STDIN_FILENO, &commands) < 0) FAIL("epoll_ctl: %s", strerror(errno));
    mark();
    for (;;) {
        /* A fan-out runs from its first delivery on: until then the publisher needs this core. */
        bool look = spinning && deliveries_ever > expected_from;
        int64_t began = look ? clock_ns(CLOCK_THREAD_CPUTIME_ID) : 0;
        int ready = epoll_wait(epoll, events, EVENTS_MAX, look ? 0 : -1);
        if (look && ready == 0) idle_ns += clock_ns(CLOCK_THREAD_CPUTIME_ID) - began;
        for (int i = 0; i < ready; i++) {
            struct connection *c = events[i].data.ptr;
            if (!c) {
                hear();
            } else if (c->state == CONNECTING) {
                ask(c);
            } else if (c->state == HEAD || c->state == BODY) {
                take(c);
            }
        }
    }
}
