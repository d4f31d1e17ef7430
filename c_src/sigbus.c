/* sigbus.c - a VMM that truncates the memory file makes our next touch a SIGBUS; it must cost that
 * one ring, not the daemon. Must not know what the guarded code does. */
#include <signal.h>
#include <stddef.h>

#include "vhd.h"

static _Thread_local sigjmp_buf *landing;
static struct sigaction previous;
static pthread_once_t installed = PTHREAD_ONCE_INIT;

static void on_sigbus(int number, siginfo_t *info, void *context)
{
    sigjmp_buf *target = landing;
    bool sent = info->si_code <= 0; /* by kill() and its like: nobody touched anything */

    if (target != NULL && !sent) {
        landing = NULL;
        siglongjmp(*target, 1);
    }
    /* Not ours: as if we had never been here. */
    if (previous.sa_flags & SA_SIGINFO) {
        previous.sa_sigaction(number, info, context);
    } else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
        previous.sa_handler(number);
    } else if (previous.sa_handler == SIG_DFL || !sent) {
        /* Returning runs into the same fault again; a signal that was sent must be sent again. */
        sigaction(SIGBUS, &previous, NULL);
        if (sent)
            (void)raise(number);
    }
}

static void install(void)
{
    struct sigaction action = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_NODEFER};

    sigemptyset(&action.sa_mask);
    int rc = sigaction(SIGBUS, &action, &previous);
    assert(rc == 0);
    (void)rc;
}

bool vhd_sigbus_guard(void (*body)(void *argument), void *argument)
{
    sigjmp_buf here;

    pthread_once(&installed, install);
    assert(landing == NULL);
    if (sigsetjmp(here, 0) != 0)
        return false;
    landing = &here;
    body(argument);
    landing = NULL;
    return true;
}
