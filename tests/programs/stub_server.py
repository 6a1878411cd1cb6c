"""A server without a model: it listens once the file of its argument is there."""

import os
import socket
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

from mlx_safe.server import supervisor
from mlx_safe.server.handover import Handover, Message


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


while not os.path.exists(sys.argv[2]):
    time.sleep(0.01)
server = HTTPServer(("", 0), Handler, bind_and_activate=False)
server.socket = socket.socket(fileno=int(os.environ[supervisor.LISTEN_FD]))
parent = Handover.of_environment()
parent.tell(Message.LISTENS)
parent.take_over(lambda held, _: server.process_request(held, None))
server.serve_forever()
