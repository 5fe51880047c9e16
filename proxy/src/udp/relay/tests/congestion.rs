//! Tests of a listener whose send buffer is full. Loopback does not fill it; the tests queue replies themselves.

use rproxy_sys::udp::BATCH;

use super::*;
use crate::udp::batch::Batch;
use crate::udp::client_sockets::GRACE;
use crate::udp::congestion::RETRY_AFTER;
use crate::udp::flow::Blocked;
use crate::udp::listeners::Listener;
use crate::udp::send::Waiting;
use crate::udp::token::interest;

#[test]
fn a_flow_has_a_socket_towards_its_client_while_it_needs_that() {
    let mut scene = Scene::new(Limits::default());
    let client = scene.client();
    client.send(b"hello").unwrap();
    let (_hello, flow) = scene.at_backend();
    let id = scene.flow(&client).unwrap();
    let socket_of = |scene: &Scene| scene.relay.table.get(id).unwrap().1.client_socket.is_some();
    assert!(scene.relay.give_client_socket(id) && socket_of(&scene));
    assert!(scene.relay.give_client_socket(id), "it has one");
    // Both directions use that socket now, and the client sees no difference.
    client.send(b"question").unwrap();
    assert_eq!(scene.at_backend(), (b"question".to_vec(), flow));
    scene.backend.send_to(b"an answer", flow).unwrap();
    assert_eq!(scene.at_client(&client), b"an answer");
    assert_eq!(scene.stats().flows_total.get(), 1);

    // The listener is not full: the next check finds that the socket is not needed.
    let now = Instant::now();
    scene.relay.retire_unneeded(now);
    assert!(socket_of(&scene), "it is not looked at yet");
    scene.relay.retire_unneeded(now + Duration::from_secs(2));
    assert!(!socket_of(&scene));
    assert_eq!(scene.relay.client_sockets.retired.len(), 1);
    // Datagrams that arrive there before it is closed are forwarded, like those that arrive at the listener.
    client.send(b"again").unwrap();
    assert_eq!(scene.at_backend(), (b"again".to_vec(), flow));
    scene.relay.close_retired(Some(Instant::now() + Duration::from_secs(1)));
    assert!(scene.relay.client_sockets.retired.is_empty());
    scene.backend.send_to(b"the last", flow).unwrap();
    assert_eq!(scene.at_client(&client), b"the last");
}

#[test]
fn a_flow_whose_client_blocks_does_without_a_socket_of_its_own_for_longer_each_time() {
    let mut scene = Scene::new(Limits::default());
    let client = scene.client();
    client.send(b"hello").unwrap();
    scene.at_backend();
    let id = scene.flow(&client).unwrap();
    for seconds in [4, 8, 16] {
        assert!(scene.relay.give_client_socket(id));
        let (_key, flow) = scene.relay.table.get_mut(id).unwrap();
        let now = Instant::now();
        flow.client_socket.as_mut().unwrap().full_at = Some(now);
        scene.relay.retire_unneeded(now + Duration::from_secs(2));
        let (_key, flow) = scene.relay.table.get_mut(id).unwrap();
        assert!(flow.client_socket.is_none());
        let blocked = flow.blocked.unwrap();
        assert_eq!(blocked.length, Duration::from_secs(seconds));
        assert!(!scene.relay.give_client_socket(id), "not until that is over");
        let (_key, flow) = scene.relay.table.get_mut(id).unwrap();
        flow.blocked.as_mut().unwrap().until = scene.relay.turn.start();
    }
}

impl Scene {
    /// A client with a flow, and the address of that towards the backend.
    fn client_with_flow(&mut self) -> (UdpSocket, FlowId, SocketAddr) {
        let client = self.client();
        client.send(b"hello").unwrap();
        let (_hello, flow) = self.at_backend();
        let id = self.flow(&client).unwrap();
        self.settle();
        (client, id, flow)
    }

    fn listener(&mut self) -> &mut Listener {
        let number = self.port.number();
        &mut self.relay.listeners[number]
    }

    fn flow_of(&mut self, id: FlowId) -> &mut Flow {
        self.relay.table.get_mut(id).unwrap().1
    }

    /// Queues a reply to `client` at the listener, as if that was full.
    fn queue(&mut self, client: &UdpSocket, bytes: &[u8]) {
        let (to, flow) = (Some(address(client)), self.flow(client));
        self.listener().queue.push(Waiting::of(bytes, to).of_flow(flow));
        if let Some(id) = flow {
            self.flow_of(id).has_queued = true;
        }
        self.watch();
    }

    /// Queues a reply at the client socket of a flow, as if that was full.
    fn queue_at_client_socket(&mut self, id: FlowId, bytes: &[u8]) {
        let now = self.relay.turn.start();
        let flow = self.flow_of(id);
        flow.is_waiting = true;
        let client = flow.client_socket.as_mut().unwrap();
        client.queue.push(Waiting::of(bytes, None).of_flow(Some(id)));
        client.full_at = Some(now);
        let (_key, flow) = self.relay.table.get(id).unwrap();
        let client = flow.client_socket.as_ref().unwrap();
        let epoll = self.relay.poll.epoll();
        interest(epoll, client.as_fd(), Token::Client(id), client.wanted());
        interest(epoll, flow.as_fd(), Token::Flow(id), flow.wanted());
    }

    /// Watches the listener for what it wants.
    fn watch(&self) {
        let number = self.port.number();
        let listener = &self.relay.listeners[number];
        interest(self.relay.poll.epoll(), listener.as_fd(), Token::Listener(number), listener.wanted());
    }

    /// Lets a flow have no client socket.
    fn block(&mut self, id: FlowId) {
        let length = Duration::from_secs(3600);
        self.flow_of(id).blocked = Some(Blocked { until: Instant::now() + length, length });
    }

    /// Serves a flow as if it was reported as readable.
    fn serve_flow(&mut self, id: FlowId) {
        let mut batch = Batch::default();
        self.relay.serve_flow(id, EpollFlags::EPOLLIN, &mut batch);
        self.relay.send_answers(&mut batch);
    }

    /// The id of a flow that has ended.
    fn ended_flow(&mut self) -> FlowId {
        let (_client, id, _flow) = self.client_with_flow();
        drop(self.relay.table.remove(id));
        id
    }
}

/// The datagrams that a client has received.
fn received(client: &UdpSocket) -> Vec<String> {
    let mut buffer = [0; 2000];
    let next =
        || client.recv(&mut buffer).ok().map(|len| String::from_utf8_lossy(&buffer[..len]).into_owned());
    std::iter::from_fn(next).collect()
}

#[test]
fn queued_replies_leave_by_client_sockets_and_others_stay_in_order() {
    let mut scene = Scene::new(Limits::default());
    let (client, id, _flow) = scene.client_with_flow();
    let (blocked, blocked_id, _flow) = scene.client_with_flow();
    let (gone, gone_id, _flow) = scene.client_with_flow();
    scene.block(blocked_id);
    drop(scene.relay.table.remove(gone_id));
    for number in 1..=3 {
        for client in [&client, &blocked, &gone] {
            scene.queue(client, format!("reply {number}").as_bytes());
        }
    }
    scene.flow_of(blocked_id).has_queued = false;
    let number = scene.port.number();
    scene.relay.use_client_sockets(number);
    assert_eq!(received(&client), ["reply 1", "reply 2", "reply 3"]);
    assert_eq!([received(&blocked), received(&gone)], [Vec::<String>::new(), vec![]]);
    assert!(scene.listener().full_at.is_some());
    assert_eq!(scene.listener().queue.len(), 6);
    assert!(scene.flow_of(id).client_socket.is_some());
    let flow = scene.flow_of(blocked_id);
    assert!(flow.client_socket.is_none() && flow.has_queued);
    scene.settle();
    for client in [&blocked, &gone] {
        assert_eq!(received(client), ["reply 1", "reply 2", "reply 3"]);
    }
}

#[test]
fn a_reply_does_not_overtake_one_that_waits() {
    let mut scene = Scene::new(Limits::default());
    let (client, id, flow) = scene.client_with_flow();
    let (other, other_id, _flow) = scene.client_with_flow();
    scene.queue(&client, b"first");
    scene.queue(&other, b"theirs");
    scene.backend.send_to(b"second", flow).unwrap();
    scene.serve_flow(id);
    assert_eq!(received(&client), ["first", "second"]);
    assert!(!scene.flow_of(id).has_queued);
    assert!(scene.flow_of(other_id).client_socket.is_some(), "it is moved as well");
    // Nothing is queued, so that the listener is not watched for writability.
    assert_eq!(received(&other), ["theirs"]);
    scene.watch();
    scene.settle();
}

#[test]
fn a_flow_without_queued_replies_leaves_those_of_others_where_they_are() {
    let mut scene = Scene::new(Limits::default());
    let (client, id, flow) = scene.client_with_flow();
    let (other, other_id, _flow) = scene.client_with_flow();
    scene.queue(&other, b"theirs");
    scene.backend.send_to(b"mine", flow).unwrap();
    scene.serve_flow(id);
    assert_eq!(received(&client), ["mine"]);
    assert!(scene.flow_of(id).client_socket.is_some());
    assert!(scene.flow_of(other_id).client_socket.is_none());
    scene.settle();
    assert_eq!(received(&other), ["theirs"]);
}

#[test]
fn replies_that_are_queued_with_others_leave_by_client_sockets() {
    let mut scene = Scene::new(Limits::default());
    let (client, id, flow) = scene.client_with_flow();
    let (other, _id, _flow) = scene.client_with_flow();
    scene.backend.send_to(b"mine", flow).unwrap();
    let mut batch = Batch::default();
    scene.relay.serve_flow(id, EpollFlags::EPOLLIN, &mut batch);
    assert!(scene.flow_of(id).client_socket.is_none(), "the listener has room");
    scene.queue(&other, b"theirs");
    scene.relay.send_answers(&mut batch);
    assert_eq!([received(&client), received(&other)], [["mine"], ["theirs"]]);
    // The listener is not watched for writability any more.
    assert_eq!(scene.listener().queue.len(), 0);
    assert!(scene.relay.poll.look(scene.events.room()).is_err());
}

#[test]
fn a_listener_that_takes_all_replies_is_not_full() {
    let mut scene = Scene::new(Limits::default());
    let (client, _id, flow) = scene.client_with_flow();
    scene.backend.send_to(b"an answer", flow).unwrap();
    assert_eq!(scene.at_client(&client), b"an answer");
    assert_eq!(scene.listener().full_at, None);
}

#[test]
fn a_flow_whose_client_blocks_takes_turns_with_the_listener() {
    let mut scene = Scene::new(Limits::default());
    let (client, id, flow) = scene.client_with_flow();
    let (other, _id, _flow) = scene.client_with_flow();
    scene.block(id);
    scene.queue(&other, b"theirs");
    // One more than the listener takes of a flow at a time.
    let replies: Vec<_> = (1..=17).map(|number| format!("reply {number}")).collect();
    for reply in &replies {
        scene.backend.send_to(reply.as_bytes(), flow).unwrap();
    }
    scene.serve_flow(id);
    assert_eq!(received(&client), Vec::<String>::new());
    assert_eq!(scene.listener().waiting, [id]);
    let waits = scene.flow_of(id);
    assert!(waits.is_waiting && waits.has_queued);

    let number = scene.port.number();
    let mut batch = Batch::default();
    scene.relay.serve_waiting(number, &mut batch);
    assert_eq!(received(&other), ["theirs"]);
    assert_eq!(received(&client), replies[..16]);
    assert!(scene.flow_of(id).is_waiting);
    scene.settle();
    assert_eq!(received(&client), replies[16..]);
    assert!(!scene.flow_of(id).is_waiting && scene.listener().waiting.is_empty());
    scene.backend.send_to(b"goes on", flow).unwrap();
    assert_eq!(scene.at_client(&client), b"goes on");
}

#[test]
fn flows_that_have_ended_leave_the_queue_of_a_listener_when_they_are_many() {
    let mut scene = Scene::new(Limits::default());
    let gone = scene.ended_flow();
    let flows = [(); 3].map(|()| scene.client_with_flow().1);
    let [first, second, _third] = flows;
    flows.iter().for_each(|id| scene.block(*id));
    let most = 2 * flows.len() + BATCH;
    scene.listener().waiting.resize(most - 1, gone);
    scene.serve_flow(first);
    assert_eq!(scene.listener().waiting.len(), most, "they are not so many yet");
    scene.serve_flow(second);
    assert_eq!(scene.listener().waiting, [first, second]);
}

#[test]
fn replies_of_many_flows_share_the_buffers_of_a_turn() {
    let mut scene = Scene::new(Limits::default());
    let flows = [(); 4].map(|()| scene.client_with_flow());
    let replies: Vec<_> = (1..=24).map(|number| format!("reply {number}")).collect();
    for reply in &replies {
        for (_client, _id, flow) in &flows {
            scene.backend.send_to(reply.as_bytes(), *flow).unwrap();
        }
    }
    scene.settle();
    for (client, _id, _flow) in &flows {
        assert_eq!(received(client), replies);
    }
}

#[test]
fn a_flow_continues_when_its_client_socket_is_writable() {
    let mut scene = Scene::new(Limits::default());
    let (client, id, flow) = scene.client_with_flow();
    assert!(scene.relay.give_client_socket(id));
    scene.queue_at_client_socket(id, b"first");
    scene.backend.send_to(b"second", flow).unwrap();
    assert_eq!(scene.at_client(&client), b"first");
    assert_eq!(scene.at_client(&client), b"second");
    let flow = scene.flow_of(id);
    assert!(!flow.is_waiting && flow.client_socket.as_ref().unwrap().full_at.is_none());
    scene.settle();
}

#[test]
fn what_is_queued_at_a_client_socket_that_closes_leaves_by_the_listener() {
    let mut scene = Scene::new(Limits::default());
    let (client, id, flow) = scene.client_with_flow();
    let (_other, other_id, _flow) = scene.client_with_flow();
    assert!(scene.relay.give_client_socket(id) && scene.relay.give_client_socket(other_id));
    for reply in [b"first", b"other"] {
        scene.queue_at_client_socket(id, reply);
    }
    scene.relay.retire_all();
    assert!(scene.flow_of(id).has_queued && !scene.flow_of(other_id).has_queued);
    assert!(!scene.flow_of(id).is_waiting);
    assert_eq!(scene.listener().queue.len(), 2);
    scene.settle();
    assert_eq!(received(&client), ["first", "other"]);
    scene.backend.send_to(b"goes on", flow).unwrap();
    assert_eq!(scene.at_client(&client), b"goes on");
}

#[test]
fn a_client_may_send_as_many_as_are_received_at_once() {
    let mut scene = Scene::new(Limits::default());
    let (client, id, _flow) = scene.client_with_flow();
    assert!(scene.relay.give_client_socket(id));
    for _ in 0..BATCH {
        client.send(b"question").unwrap();
    }
    scene.settle();
    assert!(scene.flow_of(id).client_socket.is_some());
    assert_eq!(scene.stats().datagrams_in.get(), 1 + BATCH as u64);
}

#[test]
fn what_a_client_socket_has_received_is_forwarded_before_it_closes() {
    let mut scene = Scene::new(Limits::default());
    let (client, id, flow) = scene.client_with_flow();
    assert!(scene.relay.give_client_socket(id));
    let socket = scene.flow_of(id).client_socket.as_ref().unwrap().as_fd().try_clone_to_owned().unwrap();
    // The client has restarted, and refused a reply meanwhile.
    let from = address(&client);
    drop(client);
    SockRef::from(&socket).send(b"to nobody").unwrap();
    let client = UdpSocket::bind(from).unwrap();
    client.connect(scene.front).unwrap();
    client.send(b"unread").unwrap();
    scene.relay.retire_all();
    let mut buffer = [0; 20];
    let (len, sender) = scene.backend.recv_from(&mut buffer).unwrap();
    assert_eq!((&buffer[..len], sender), (&b"unread"[..], flow));
    assert!(scene.relay.client_sockets.retired.is_empty());
}

#[test]
fn a_retired_socket_is_closed_when_the_kernel_has_finished() {
    let mut scene = Scene::new(Limits::default());
    let (_client, id, _flow) = scene.client_with_flow();
    assert!(scene.relay.give_client_socket(id));
    scene.relay.retire_unneeded(Instant::now() + Duration::from_secs(2));
    let since = scene.relay.client_sockets.retired[0].0;
    for (now, left) in [(since, 1), (since + GRACE / 2, 1), (since + GRACE, 0)] {
        scene.relay.close_retired(Some(now));
        assert_eq!(scene.relay.client_sockets.retired.len(), left);
    }
}

#[test]
fn a_flow_keeps_its_socket_while_the_listener_is_full_or_was_lately() {
    let mut scene = Scene::new(Limits::default());
    let (client, id, _flow) = scene.client_with_flow();
    let (other, _id, _flow) = scene.client_with_flow();
    let look = Instant::now() + Duration::from_secs(5);
    let stays = |scene: &mut Scene, look: Instant| {
        let flow = scene.flow_of(id);
        flow.client_socket.as_mut().unwrap().was_used = true;
        scene.relay.retire_unneeded(look);
        scene.flow_of(id).client_socket.is_some()
    };
    assert!(scene.relay.give_client_socket(id));
    scene.queue(&other, b"theirs");
    assert!(stays(&mut scene, look), "replies wait");
    scene.listener().queue.pop();
    scene.listener().full_at = Some(look + Duration::from_millis(500));
    assert!(stays(&mut scene, look + Duration::from_secs(1)), "they did lately");
    assert!(!stays(&mut scene, look + Duration::from_secs(2)));
    assert!(client.send(b"goes on").is_ok() && scene.at_backend().0 == b"goes on");
}

#[test]
fn a_flow_that_waits_gets_the_place_of_one_that_does_not_need_it() {
    let mut scene = Scene::new(Limits::default());
    let (_unused, unused_id, _flow) = scene.client_with_flow();
    let (client, id, flow) = scene.client_with_flow();
    let gone = scene.ended_flow();
    assert!(scene.relay.give_client_socket(unused_id));
    scene.flow_of(unused_id).client_socket.as_mut().unwrap().was_used = false;
    scene.listener().shared_until = Some(Instant::now() + Duration::from_secs(3600));
    scene.queue(&client, b"first");
    scene.backend.send_to(b"second", flow).unwrap();
    scene.listener().waiting.push_back(gone);
    scene.serve_flow(id);
    assert_eq!(scene.listener().waiting, [gone, id]);
    scene.listener().shared_until = None;
    scene.relay.retire_unneeded(Instant::now() + Duration::from_secs(2));
    assert!(scene.flow_of(unused_id).client_socket.is_none());
    assert!(scene.flow_of(id).client_socket.is_some() && scene.listener().waiting.is_empty());
    assert_eq!(received(&client), ["first"]);
    assert_eq!(scene.at_client(&client), b"second");
}

#[test]
fn a_listener_may_have_no_client_sockets_for_some_time() {
    let mut scene = Scene::new(Limits::default());
    let (client, id, _flow) = scene.client_with_flow();
    let now = scene.relay.turn.start();
    scene.listener().shared_until = Some(now + Duration::from_millis(1));
    assert!(!scene.relay.give_client_socket(id));
    scene.queue(&client, b"an answer");
    let number = scene.port.number();
    scene.relay.use_client_sockets(number);
    assert_eq!(scene.listener().queue.len(), 1);
    scene.listener().shared_until = Some(now);
    scene.listener().is_paused = true;
    assert!(!scene.relay.give_client_socket(id), "another process may have the port");
    scene.listener().is_paused = false;
    assert!(scene.relay.give_client_socket(id));
}

#[test]
fn a_listener_whose_sockets_cannot_be_opened_tries_again_later() {
    let mut scene = Scene::new(Limits::default());
    let (_client, id, _flow) = scene.client_with_flow();
    // Replies of another socket would have another lifetime.
    let listener = scene.port.as_fd().try_clone_to_owned().unwrap();
    SockRef::from(&listener).set_ttl_v4(9).unwrap();
    let now = scene.relay.turn.start();
    assert!(!scene.relay.give_client_socket(id));
    assert_eq!(scene.listener().shared_until, Some(now + RETRY_AFTER));
}

#[test]
fn what_comes_from_elsewhere_is_no_sign_of_the_backend() {
    let mut scene = Scene::new(Limits { udp_any_port: true, ..Limits::default() });
    let (_client, id, flow) = scene.client_with_flow();
    let stranger = UdpSocket::bind("127.0.0.2:0").unwrap();
    stranger.send_to(b"forged", flow).unwrap();
    scene.serve_until("it is dropped", |scene| scene.failures(FailureKind::Forged) == 1);
    scene.relay.table.touch(id, Side::Client, Instant::now());
    assert!(!scene.relay.table.is_established(id));
}
