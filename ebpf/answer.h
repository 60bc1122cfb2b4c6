// SPDX-License-Identifier: Apache-2.0 OR MIT OR GPL-2.0-only
// What a backend answers: to its client it comes from the service.
#pragma once
#include "connection.h"
#include "rewrite.h"

// Gives an answer of a known connection the service's address and port; whatever else it is stays as it is.
SEPARATE int translate_answer(struct __sk_buff *skb, struct packet *packet) {
    __u32 zero = 0;
    struct counts *counted;
    struct scratch *scratch = bpf_map_lookup_elem(&scratches, &zero);
    if (!packet || !scratch)
        return -1;
    if (read_ports(skb, packet))
        return 0;
    packet->tuple.reply = 1;
    // The keys are there and not on the stack, which the programs that carry packets need for themselves.
    struct tuple *tuple = &scratch->tuple, *other = &scratch->other;
    *tuple = packet->tuple;
    struct connection *connection = find(tuple, other, &counted);
    if (!connection || connection->loops)
        return 0;
    // Its entry may become another's as soon as it has left the table.
    struct connection *carried = &scratch->connection;
    *carried = *connection;
    remember_fragment(skb, packet);
    count_outgoing(counted, skb);
    follow(connection, tuple, other, packet);
    note_translation(packet, &carried->source, carried->source_port);
    return rewrite(skb, packet, carried);
}
