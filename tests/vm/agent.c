/* The guest's first process: runs commands that arrive on a serial line.
 *
 * Every message, both ways, is a frame: the byte 1, "VERB ID LENGTH\n", then LENGTH bytes.
 *   host to guest: hello 0, run ID command, start ID command (keeps a pipe as standard input),
 *                  input ID bytes, eof ID, kill ID
 *   guest to host: ready 0 "RELEASE BOOT-ID", output ID bytes, exit ID "STATUS"
 * Several commands run at once. Bytes before the host's hello are left over from before a
 * reboot and are dropped. It must not know what is tested with it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/signalfd.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

enum { MAX_COMMANDS = 32, MAX_HEADER = 64, MAX_PAYLOAD = 1 << 20, CHUNK = 4096 };

struct command {
    pid_t pid; /* 0: the slot is free */
    long id;
    int output;
    int input; /* -1: none */
};

static struct command commands[MAX_COMMANDS];
static int line_fd;

static void fail(const char *what)
{
    fprintf(stderr, "agent: %s: %s\n", what, strerror(errno));
    exit(1); /* the kernel panics: the console log tells the host why */
}

static void write_all(int fd, const void *data, size_t size)
{
    const char *at = data;
    while (size > 0) {
        ssize_t done = write(fd, at, size);
        if (done < 0 && errno == EAGAIN) {
            struct pollfd writable = {.fd = fd, .events = POLLOUT};
            poll(&writable, 1, -1);
            continue;
        }
        if (done < 0 && errno == EINTR)
            continue;
        if (done < 0)
            return; /* a child that closed its standard input; the serial line cannot fail */
        at += done;
        size -= (size_t)done;
    }
}

static void send_frame(const char *verb, long id, const void *data, size_t size)
{
    char header[MAX_HEADER];
    int length = snprintf(header, sizeof header, "\001%s %ld %zu\n", verb, id, size);
    write_all(line_fd, header, (size_t)length);
    write_all(line_fd, data, size);
}

static void send_exit(long id, int status)
{
    char text[16];
    int length = snprintf(text, sizeof text, "%d", status);
    send_frame("exit", id, text, (size_t)length);
}

static struct command *find_command(long id)
{
    for (struct command *c = commands; c < commands + MAX_COMMANDS; c++)
        if (c->pid != 0 && c->id == id)
            return c;
    return NULL;
}

static void become_shell(char *text, int input, int output)
{
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    signal(SIGPIPE, SIG_DFL);
    setsid();
    dup2(input, 0);
    dup2(output, 1);
    dup2(output, 2);
    /* The agent is never chosen by the OOM killer, its commands are. */
    int score = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
    if (score >= 0)
        write_all(score, "0", 1);
    execl("/bin/sh", "sh", "-c", text, (char *)NULL);
    _exit(127);
}

static void refuse(long id, const char *why)
{
    send_frame("output", id, why, strlen(why));
    send_exit(id, 126);
}

static void start_command(long id, char *text, int wants_input)
{
    struct command *slot = commands;
    while (slot < commands + MAX_COMMANDS && slot->pid != 0)
        slot++;
    if (slot == commands + MAX_COMMANDS) {
        refuse(id, "agent: too many commands at once\n");
        return;
    }
    int output[2];
    int input[2] = {-1, -1};
    if (pipe2(output, O_CLOEXEC) < 0 || (wants_input && pipe2(input, O_CLOEXEC) < 0))
        fail("pipe2");
    if (!wants_input)
        input[0] = open("/dev/null", O_RDONLY | O_CLOEXEC);
    pid_t pid = fork();
    if (pid == 0)
        become_shell(text, input[0], output[1]);
    close(input[0]);
    close(output[1]);
    if (pid < 0) {
        refuse(id, "agent: fork: out of memory\n");
        close(output[0]);
        if (wants_input)
            close(input[1]);
        return;
    }
    fcntl(output[0], F_SETFL, O_NONBLOCK);
    *slot = (struct command){.pid = pid, .id = id, .output = output[0], .input = input[1]};
}

static void close_input(struct command *c)
{
    if (c->input >= 0)
        close(c->input);
    c->input = -1;
}

static int handle_frame(const char *verb, long id, char *payload, size_t size)
{
    struct command *c = find_command(id);
    if (strcmp(verb, "run") == 0 || strcmp(verb, "start") == 0)
        start_command(id, payload, verb[0] == 's');
    else if (c == NULL)
        return 0; /* it has ended meanwhile; its exit is on the way */
    else if (strcmp(verb, "input") == 0 && c->input >= 0)
        write_all(c->input, payload, size);
    else if (strcmp(verb, "eof") == 0)
        close_input(c);
    else if (strcmp(verb, "kill") == 0)
        kill(-c->pid, SIGKILL);
    return 0;
}

/* Handle the frames in buffer[0..used), return how many bytes they took. */
static size_t handle_input(char *buffer, size_t used, int *greeted)
{
    static const char hello[] = "\001hello 0 0\n";
    size_t at = 0;
    if (!*greeted) {
        char *found = memmem(buffer, used, hello, sizeof hello - 1);
        if (found == NULL) /* keep what may be the beginning of it */
            return used < sizeof hello ? 0 : used - sizeof hello + 1;
        *greeted = 1;
        at = (size_t)(found - buffer) + sizeof hello - 1;
    }
    for (;;) {
        char verb[16];
        long id;
        size_t size;
        char *newline = memchr(buffer + at, '\n', used - at);
        if (newline == NULL)
            return at;
        *newline = 0;
        if (sscanf(buffer + at, "\001%15s %ld %zu", verb, &id, &size) != 3 || size > MAX_PAYLOAD) {
            errno = EPROTO;
            fail(buffer + at);
        }
        *newline = '\n';
        char *payload = newline + 1;
        if ((size_t)(buffer + used - payload) < size)
            return at;
        char next = payload[size]; /* the buffer is one byte longer than it is ever filled */
        payload[size] = 0;
        handle_frame(verb, id, payload, size);
        payload[size] = next;
        at = (size_t)(payload - buffer) + size;
    }
}

static void read_line(void)
{
    static char buffer[MAX_PAYLOAD + MAX_HEADER + CHUNK + 1];
    static size_t used;
    static int greeted;
    for (;;) {
        ssize_t got = read(line_fd, buffer + used, CHUNK);
        if (got <= 0)
            return;
        used += (size_t)got;
        size_t taken = handle_input(buffer, used, &greeted);
        memmove(buffer, buffer + taken, used - taken);
        used -= taken;
    }
}

static void forward_output(struct command *c)
{
    char chunk[CHUNK];
    ssize_t got;
    while ((got = read(c->output, chunk, sizeof chunk)) > 0)
        send_frame("output", c->id, chunk, (size_t)got);
    if (got == 0) { /* closed by the command, which lives on: poll no more */
        close(c->output);
        c->output = -1;
    }
}

static void reap(void)
{
    int status;
    pid_t pid;
    while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
        for (struct command *c = commands; c < commands + MAX_COMMANDS; c++) {
            if (c->pid != pid)
                continue;
            if (c->output >= 0)
                forward_output(c);
            if (c->output >= 0)
                close(c->output); /* held open by what it left running: not waited for */
            close_input(c);
            c->pid = 0;
            send_exit(c->id, WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status));
        }
    }
}

static void open_line(const char *path)
{
    struct termios settings;
    line_fd = open(path, O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC);
    if (line_fd < 0 || tcgetattr(line_fd, &settings) < 0)
        fail(path);
    cfmakeraw(&settings);
    cfsetspeed(&settings, B115200);
    settings.c_cflag |= CLOCAL;
    if (tcsetattr(line_fd, TCSANOW, &settings) < 0)
        fail(path);
    tcflush(line_fd, TCIOFLUSH);
}

static void announce(void)
{
    struct utsname name;
    char boot[40] = "";
    char text[sizeof name.release + sizeof boot];
    int fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
    if (fd < 0 || read(fd, boot, 36) != 36 || uname(&name) < 0)
        fail("boot_id");
    close(fd);
    int length = snprintf(text, sizeof text, "%s %s", name.release, boot);
    send_frame("ready", 0, text, (size_t)length);
}

int main(int argc, char **argv)
{
    sigset_t watched;
    if (argc != 2)
        return 2;
    setenv("PATH", "/bin:/sbin", 1);
    setenv("HOME", "/root", 1);
    signal(SIGPIPE, SIG_IGN);
    sigemptyset(&watched);
    sigaddset(&watched, SIGCHLD);
    sigprocmask(SIG_BLOCK, &watched, NULL);
    int children = signalfd(-1, &watched, SFD_NONBLOCK | SFD_CLOEXEC);
    if (children < 0)
        fail("signalfd");
    open_line(argv[1]);
    mlockall(MCL_CURRENT);
    announce();
    for (;;) {
        struct pollfd waits[2 + MAX_COMMANDS] = {
            {.fd = line_fd, .events = POLLIN},
            {.fd = children, .events = POLLIN},
        };
        for (int i = 0; i < MAX_COMMANDS; i++)
            waits[2 + i] =
                (struct pollfd){.fd = commands[i].pid ? commands[i].output : -1, .events = POLLIN};
        if (poll(waits, 2 + MAX_COMMANDS, -1) < 0)
            continue;
        for (int i = 0; i < MAX_COMMANDS; i++)
            if (waits[2 + i].revents != 0)
                forward_output(&commands[i]);
        if (waits[1].revents != 0) {
            struct signalfd_siginfo info;
            while (read(children, &info, sizeof info) > 0)
                ;
            reap();
        }
        if (waits[0].revents != 0)
            read_line();
    }
}
