// SPDX-License-Identifier: Apache-2.0 OR MIT OR GPL-2.0-only
// What the wire brought, where it crosses the sandbox on its way into a container: its mark is the device
// that leads there, and ends here.
#include <linux/pkt_cls.h>

#include "maps.h"

SEC("classifier")
int netctl_into(struct __sk_buff *skb) {
    __u32 interface = skb->mark;
    if (!interface)
        return TC_ACT_SHOT;
    skb->mark = 0;
    return bpf_redirect_peer(interface, 0);
}

const char LICENSE[] SEC("license") = "Dual MIT/GPL";
